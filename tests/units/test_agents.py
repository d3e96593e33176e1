"""The teacher reads what the student read plus the context: plain prompts."""

from types import SimpleNamespace

from sdpo_plugin import plugins
from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.prompts import prompt_as_scored
from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids


def test_the_context_of_a_plain_prompt_is_inside_the_input_template(model):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from datasets import Dataset
    from transformers import AutoTokenizer

    from sdpo_plugin.interface.rollout_batch import prompt_messages
    from sdpo_plugin.openrlhf_adapter.controller.rollout import PromptDataset

    data = SimpleNamespace(
        input_key="question", label_key=None, apply_chat_template=False, input_template="User: {}\nAssistant:",
        chat_template_kwargs="{}",
    )  # fmt: skip
    args = SimpleNamespace(data=data, plugins=[], algo=SimpleNamespace(name=None))
    plugins.activate(args)
    strategy, tokenizer = SimpleNamespace(args=args, is_rank_0=lambda: False), AutoTokenizer.from_pretrained(model)
    rows = Dataset.from_list([{"question": "What is {x} in {}?"}])
    records = PromptDataset(rows, tokenizer, strategy, input_template=data.input_template)
    _, prompt, _, _ = records[0]
    assert prompt == "User: What is {x} in {}?\nAssistant:"

    own = tokenizer(str(prompt))["input_ids"]
    read = prompt_as_scored(prompt_messages(records.rows[0], args), own, tokenizer)
    (context,) = build_teacher_contexts([Rollout(0, read, "", 0.0, "{y}")], RepromptConfig())
    shown = tokenizer.decode(teacher_prompt_ids(context, tokenizer, RepromptConfig())[0])
    assert shown.startswith("User: What is {x} in {}?\n") and shown.endswith("original question.\nAssistant:")
    assert "earlier attempt:\n\n{y}\n" in shown and shown.count("Assistant:") == 1
