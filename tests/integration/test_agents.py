"""The teacher reads what the student read plus the context: an agent's `reset` on the real host, plain prompts."""


import torch
from common import ROWS, SDPO

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts

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


def test_the_teacher_scores_what_reset_gave_the_student(openrlhf, model, monkeypatch, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "agent.py").write_text(AGENT)
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
