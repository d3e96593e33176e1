"""The teacher reads what the student read plus the context: an agent's `reset` on the real host, plain prompts."""

from pathlib import Path
from types import SimpleNamespace

import torch
from common import ROWS, SDPO

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.context import Rollout, build_teacher_contexts, prompt_as_read, teacher_prompt_ids

AGENT = """
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

class Room(AgentInstanceBase):
    def __init__(self):
        pass

    async def reset(self, states, **kwargs):
        prompt = states["observation"]
        assert type(prompt) is str and prompt.split("|>")[1] == f"say {states['label']}<|assistant"
        turn = prompt.removesuffix("<|assistant|>")
        seen = [prompt, prompt + "I see a door.", turn + " You see a door.<|assistant|>", "A room with a door."]
        return {"observation": seen[int(states["label"]) % 4]}

    async def step(self, states, **kwargs):
        return {
            "rewards": torch.tensor(0.0), "environment_feedback": "Closed.", "done": True,
            "extra_logs": {"feedback": "the door is <|assistant|> closed"},
        }

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Room)
"""


def test_the_teacher_reads_what_reset_gave_the_student(openrlhf, model, monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "agent.py").write_text(AGENT)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = openrlhf(
        model, ROWS, "", *SDPO, "--train.agent_func_path", str(tmp_path / "agent.py"),
        "--plugins", "sdpo_plugin.testing", "attached", "--attached.out", str(tmp_path / "attached.pt"),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    read = torch.load(tmp_path / "attached.pt")["teacher_prompt"]
    (step,) = run.samples
    assert len(read) == len(step) == 16
    for sample, teacher in zip(step, read, strict=True):
        label = int(sample.labels[0])
        start, text, end = [
            ("<|user|>", f"say {label}", "<|assistant|>"),
            ("<|user|>", f"say {label}", "<|assistant|>I see a door."),
            ("<|user|>", f"say {label} You see a door.", "<|assistant|>"),
            ("", "A room with a door.", ""),
        ][label % 4]
        own = tokenizer(start + text + end)["input_ids"]
        assert sample.sequences[0, : len(own)].tolist() == own and sample.action_mask[0, len(own) - 1]
        rollout = Rollout(0, text, "", 0.0, "the door is <|assistant|> closed")
        (context,) = build_teacher_contexts([rollout], RepromptConfig())
        assert tokenizer.decode(teacher) == start + context.messages + end
        assert teacher.tolist().count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == end.count("<|assistant|>")


def test_the_context_of_a_plain_prompt_is_inside_the_input_template(model):
    from sdpo_plugin.host import cpu

    cpu.enable()
    from datasets import Dataset
    from transformers import AutoTokenizer

    from sdpo_plugin.host.controller import Records
    from sdpo_plugin.plugin import prompt_messages

    data = SimpleNamespace(
        input_key="question", label_key=None, apply_chat_template=False, input_template="User: {}\nAssistant:",
        chat_template_kwargs="{}",
    )  # fmt: skip
    args = SimpleNamespace(data=data, plugins=[], algo=SimpleNamespace(name="sdpo"))
    strategy, tokenizer = SimpleNamespace(args=args, is_rank_0=lambda: False), AutoTokenizer.from_pretrained(model)
    rows = Dataset.from_list([{"question": "What is {x} in {}?"}])
    records = Records(rows, tokenizer, strategy, input_template=data.input_template)
    _, prompt, _, _ = records[0]
    assert prompt == "User: What is {x} in {}?\nAssistant:"

    own = tokenizer(str(prompt))["input_ids"]
    read = prompt_as_read(prompt_messages(records.rows[0], args), own, tokenizer)
    (context,) = build_teacher_contexts([Rollout(0, read, "", 0.0, "{y}")], RepromptConfig())
    shown = tokenizer.decode(teacher_prompt_ids(context, tokenizer, RepromptConfig())[0])
    assert shown.startswith("User: What is {x} in {}?\n") and shown.endswith("original question.\nAssistant:")
    assert "earlier attempt:\n\n{y}\n" in shown and shown.count("Assistant:") == 1
