"""What is read of a prompt: with processors for tokenizers, chat templates of all kinds, and rows of all shapes."""

import copy
import json
import os
import shutil
from datetime import datetime, timedelta
from types import SimpleNamespace

import mistral_common
import pytest
from common import processor_of
from datasets import Dataset
from transformers import AutoTokenizer

from sdpo_plugin import plugins
from sdpo_plugin.algorithms.sdft import SDFT
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import ConfigError, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.prompts import FramedText, prompt_as_scored, rendered, require_printed, text_tokenizer
from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids
from sdpo_plugin.interface.rollout_batch import RolloutBatch, prompt_messages
from sdpo_plugin.monitoring.recorder import token_texts
from sdpo_plugin.testing import fake_worker

CONFIG = RepromptConfig(template="{prompt} | {feedback}", feedback_template="{feedback_raw}")
FRAME = "{{% for m in messages %}}<|{{{{ m.role }}}}|>{content}{{% endfor %}}<|assistant|>"


@pytest.fixture
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def preflight():
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    return preflight


def user(content, **more):
    return {"role": "user", "content": content, **more}


def text(*texts, **more):
    return [{"type": "text", "text": one, **more} for one in texts]


def teacher_text(chat, tokenizer, feedback="no") -> str:
    (context,) = build_teacher_contexts([Rollout(0, chat, "r", 0.0, feedback)], CONFIG)
    return tokenizer.decode(teacher_prompt_ids(context, tokenizer, CONFIG)[0])


# ── processors ──


@pytest.mark.parametrize("question", ["2+2?", "http://x.org/cat.png", "/etc/hostname", "data:image/png;base64,aaaa"])
def test_a_processor_reads_as_its_tokenizer_does(tokenizer, question):
    processor, chat = processor_of(copy.deepcopy(tokenizer)), [user(question)]
    assert not hasattr(processor, "convert_ids_to_tokens")
    inner = text_tokenizer(processor)
    assert inner is processor.tokenizer is text_tokenizer(inner)
    for prompt in (chat, question, FramedText("Q: ", question, " A:")):
        (context,) = build_teacher_contexts([Rollout(0, prompt, "r", 0.0, "no")], CONFIG)
        ids, cuts = teacher_prompt_ids(context, processor, CONFIG)
        assert (ids, cuts) == teacher_prompt_ids(context, tokenizer, CONFIG)
        assert f"{question} | no" in inner.decode(ids)
        own = tokenizer(rendered(prompt, tokenizer), add_special_tokens=False)["input_ids"]
        assert prompt_as_scored(prompt, own, processor) is prompt
        assert prompt_as_scored(prompt, [*own, 9], processor) == prompt_as_scored(prompt, [*own, 9], tokenizer)
    assert token_texts(own, processor) == token_texts(own, tokenizer)
    assert RolloutBatch([], [], None, processor, 512).tokenizer is inner


def test_the_processor_s_chat_template_is_the_one(tokenizer):
    """That of LLaVA's older checkpoints is in the processor's own file, and OpenRLHF renders with it."""
    processor = processor_of(tokenizer)
    processor.chat_template = "{% for m in messages %}PROCESSOR{{ m.content }}{% endfor %}"
    assert rendered([user("Q?")], processor) == "PROCESSORQ?" == processor.apply_chat_template([user("Q?")])


def test_an_engine_reads_prompts_through_a_processor(preflight, tokenizer):
    import asyncio

    from sdpo_plugin.openrlhf_adapter.engine import engine

    async def execute(**given):
        raise KeyError("no test")

    given = {"prompt": "<|user|>http://x.org/a.png<|assistant|>", "label": "", "max_length": 512}
    given["sampling_params"] = SimpleNamespace(logprobs=None)
    answers = [
        asyncio.run(engine.failures_kept(execute)(hf_tokenizer=one, **given))
        for one in (tokenizer, processor_of(copy.deepcopy(tokenizer)))
    ]
    assert answers[0]["observation_tokens"] == answers[1]["observation_tokens"]
    assert tokenizer.decode(answers[0]["observation_tokens"]) == given["prompt"]


# ── mistral-common's tokenizer ──


def test_mistral_common_s_tokenizer_is_rejected_by_name(preflight, tmp_path):
    """Of a rendered chat it reads the mark-up as plain characters. Its vocabulary is cut, to load in a second."""
    with open(os.path.join(os.path.dirname(mistral_common.__file__), "data", "tekken_240911.json")) as file:
        tekken = json.load(file)
    tekken["vocab"], tekken["config"]["default_vocab_size"] = tekken["vocab"][:300], 1300
    (tmp_path / "tekken.json").write_text(json.dumps(tekken))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 131072}))
    args = SimpleNamespace(
        actor=SimpleNamespace(model_name_or_path=str(tmp_path)), data=SimpleNamespace(apply_chat_template=True)
    )
    with pytest.raises(ConfigError, match=rf"{tmp_path}.* MistralCommonBackend.*without tekken.json.*tokenizer.json"):
        preflight.tokenizer(args)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    marked_up = tokenizer.apply_chat_template([user("Q?")], tokenize=False)
    assert "[INST]" in marked_up
    plain, chat = tokenizer(marked_up, add_special_tokens=False), tokenizer.apply_chat_template([user("Q?")])
    assert len(plain["input_ids"]) > len(chat["input_ids"])
    with pytest.raises(ConfigError, match="MistralCommonBackend"):
        teacher_text("Q?", tokenizer)


# ── shapes of rows and of templates ──

PARTS = "{% for p in m.content %}{{ p.text if p.type == 'text' }}{{ '<image>' if 'image' in p }}{% endfor %}"
TEMPLATES = {
    "prints": "{{ m.content }}",
    "adds": "{{ m.content + '' }}",
    "strips": "{{ m.content.strip() }}",
    "as JSON": "{{ m.content if m.content is string else m.content | tojson }}",
    "drops lists": "{{ m.content if m.content is string else '' }}",
    "drops texts": "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
    "parts first": "{% if 'image' in m.content[0] %}<image>{% endif %}" + PARTS,
    "both": "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
    "refuses lists": "{{ raise_exception('text only') if m.content is not string }}{{ m.content }}",
}  # fmt: skip
ROWS = {
    "text": ([user("Why?")], "<|user|>Why?"),
    "a part": ([user(text("Why?"))], "<|user|>Why?"),
    "as Arrow has it": ([user(text("Why?", image=None), name=None, tool_calls=None)], "<|user|>Why?"),
    "mixed": ([{"role": "system", "content": "Be brief."}, user(text("Why?"))], "<|system|>Be brief.<|user|>Why?"),
    "history": ([user(text("a")), {"role": "assistant", "content": text("b")}, user(text("Why?"))],
                "<|user|>a<|assistant|>b<|user|>Why?"),
}  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("row", ROWS)
def test_every_template_prints_every_row_for_student_and_teacher(tokenizer, template, row):
    tokenizer.chat_template = FRAME.format(content=TEMPLATES[template])
    chat, expected = ROWS[row]
    before = copy.deepcopy(chat)
    require_printed(chat, tokenizer)
    assert rendered(chat, tokenizer) == f"{expected}<|assistant|>"
    assert teacher_text(chat, tokenizer) == f"{expected} | no<|assistant|>"
    assert chat == before


@pytest.mark.parametrize("template, between", [("prints", "\n"), ("both", ""), ("drops texts", "")])
def test_several_parts_are_joined_by_line_breaks_where_the_template_reads_text(tokenizer, template, between):
    tokenizer.chat_template = FRAME.format(content=TEMPLATES[template])
    chat = [user(text("A 'cat'.", "Why?"))]
    assert rendered(chat, tokenizer) == f"<|user|>A 'cat'.{between}Why?<|assistant|>"
    assert teacher_text(chat, tokenizer) == f"<|user|>A 'cat'.{between}Why? | no<|assistant|>"


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]}


@pytest.mark.parametrize("call", [CALL, {**CALL, "content": None}], ids=["no content", "null"])
@pytest.mark.parametrize("template", ["prints", "adds", "drops lists", "drops texts", "both"])
def test_a_tool_call_needs_no_content(preflight, tokenizer, call, template):
    shown = "{{ m.tool_calls[0].function.arguments | tojson if m.tool_calls }}" + TEMPLATES[template]
    tokenizer.chat_template = FRAME.format(content=shown)
    chat = [user("a"), call, {"role": "tool", "content": "7"}, user("Why?")]
    args = SimpleNamespace(data=SimpleNamespace(input_key="prompt", apply_chat_template=True))
    preflight.prompts("rows.jsonl", [chat], args)
    expected = '<|user|>a<|assistant|>{"x": null}<|tool|>7<|user|>Why?'
    assert rendered(chat, tokenizer) == f"{expected}<|assistant|>"
    assert teacher_text(chat, tokenizer) == f"{expected} | no<|assistant|>"


@pytest.mark.parametrize(
    "last", [{"role": "user"}, user(None), user(7), user(["a"]), user([{"text": "a"}]), user([{"type": 1}])], ids=repr
)
def test_the_last_turn_needs_content(preflight, last):
    args = SimpleNamespace(data=SimpleNamespace(input_key="prompt", apply_chat_template=True))
    with pytest.raises(ConfigError, match="row 1 has .* there; expected text or a list of messages"):
        preflight.prompts("rows.jsonl", [[user("a")], [user("a"), last]], args)


@pytest.mark.parametrize(
    "template, chat, said",
    [
        ("{{ raise_exception('no system') if m.role == 'system' }}{{ m.content }}",
         [{"role": "system", "content": "S"}, user("Q?")], "rejects .* roles system, user .TemplateError: no system"),
        ("{{ m.content.nothing.more }}", [user("Q?")], "rejects .*UndefinedError"),
        ("{{ 'Hello' if m.role == 'user' }}", [user("Q?")], "does not print the text of the last turn"),
        ("{{ m.content[0].text }}", [user(text("a", "Q?"))], "does not print the text of the last turn"),
        ("{{ m.content }}", [user([{"type": "image"}, *text("Q?")])], "does not print the text of the last turn"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_read_a_row_is_named(tokenizer, template, chat, said):
    tokenizer.chat_template = FRAME.format(content=template)
    named = f"the chat template of {tokenizer.name_or_path} .*{said}.*chat_template.jinja"
    with pytest.raises(ConfigError, match=named):
        require_printed(chat, tokenizer)


def test_a_context_that_the_template_drops_is_an_error(tokenizer):
    tokenizer.chat_template = FRAME.format(content="{{ m.content[:2] }}")
    with pytest.raises(ConfigError, match="does not print the feedback section"):
        teacher_text([user("Q?")], tokenizer)


# ── templates that print the date ──

DATED = "<|system|>Today is {{ strftime_now('%d %b %Y %H:%M:%S.%f') }}.{% for m in messages %}<|{{ m.role }}|>" \
    "{{ m.content }}{% endfor %}<|assistant|>"  # fmt: skip


def test_a_prompt_keeps_its_date(tokenizer):
    tokenizer.chat_template = DATED
    first = rendered([user("Q?")], tokenizer)
    assert rendered([user("Q?")], tokenizer) == first
    assert teacher_text([user("Q?")], tokenizer) == first.replace("Q?", "Q? | no")
    elsewhere = rendered([user("Q?")], tokenizer, {"strftime_now": lambda format: "1 Jan"})
    assert elsewhere.startswith("<|system|>Today is 1 Jan.")


def test_a_prompt_of_another_day_is_the_row_s(tokenizer):
    """As of an asynchronous run, whose generator began before midnight and whose controller after it."""
    tokenizer.chat_template = DATED
    yesterday = {"strftime_now": (datetime.now() - timedelta(days=1)).strftime}
    chat = [user("Q?")]
    as_generated = rendered(chat, tokenizer, yesterday)
    ids = tokenizer(as_generated, add_special_tokens=False)["input_ids"]
    sample = SimpleNamespace(record={"prompt": chat}, prompts=[as_generated])
    batch = RolloutBatch([sample], [], fake_worker().args, tokenizer, 512)
    batch.prompt_ids = lambda i: ids
    assert batch.prompt(0) is chat

    read = prompt_as_scored(chat, ids, tokenizer)  # without the text as it was generated
    assert read == FramedText(as_generated.removesuffix("Q?<|assistant|>"), "Q?", "<|assistant|>")
    assert teacher_text(read, tokenizer) == as_generated.replace("Q?", "Q? | no")


def test_an_agent_s_own_chat_is_read_with_the_context_in_its_last_turn(tokenizer):
    tokenizer.chat_template = DATED
    own = "<|system|>A game.<|user|>Go?<|assistant|>No.<|user|>Q, again?<|assistant|>"
    read = prompt_as_scored([user("Q?")], tokenizer(own, add_special_tokens=False)["input_ids"], tokenizer)
    assert teacher_text(read, tokenizer) == own.replace("again?", "again? | no")


# ── rows on their way to the student ──


def arguments(**data):
    args = fake_worker(algo={"name": "sdpo"}, eval={"dataset": None}).args
    args.plugins = []
    names = {"input_key": "prompt", "label_key": None, "apply_chat_template": True, "chat_template_kwargs": "{}"}
    args.data = SimpleNamespace(**vars(args.data) | names | {"input_template": None, "prompt_split": "train"} | data)
    return args


@pytest.mark.parametrize("content", ["Is <image> a tag?", text("Is <image> a tag?"), "<image>"], ids=repr)
@pytest.mark.parametrize("template", ["prints", "both"])
@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, processor_of], ids=["tokenizer", "processor"])
def test_student_teacher_and_checks_read_one_prompt(preflight, tokenizer, content, template, wrap):
    from sdpo_plugin.openrlhf_adapter.controller.rollout import PromptDataset

    tokenizer.chat_template = FRAME.format(content=TEMPLATES[template])
    given, args = wrap(tokenizer), arguments()
    plugins.activate(args)
    strategy = SimpleNamespace(args=args, is_rank_0=lambda: False)
    rows = Dataset.from_list([{"prompt": [user(content)]}])
    records = PromptDataset(rows, given, strategy, input_template=None)
    (_, student, _, _) = records[0]
    whole = content if isinstance(content, str) else content[0]["text"]
    assert str(student) == f"<|user|>{whole}<|assistant|>" == rendered(prompt_messages(records.rows[0], args), given)
    assert teacher_text(records.rows[0]["prompt"], tokenizer) == f"<|user|>{whole} | no<|assistant|>"


@pytest.mark.parametrize("content", [[{"type": "image"}, *text("Why?")], [{"type": "text", "text": None}]], ids=repr)
def test_parts_that_are_no_text_are_rejected(content):
    args = fake_worker().args
    with pytest.raises(ConfigError, match="--data.input_key prompt: row 1 has a part that is not text"):
        SDPO(args).openrlhf_dataset({"prompt": [[user("a")], [user(content)]]}, False, args)


@pytest.mark.parametrize("value", [7, 7.5, ["a"], {"a": 1}, True], ids=repr)
def test_a_privileged_context_that_is_no_text_is_rejected(value):
    class Rows(dict):
        column_names = ["prompt", "privileged_context"]

    args = fake_worker(reprompt={"template": SDFT.defaults["reprompt.template"]}).args
    rows = Rows(prompt=["a", "b", "c"], privileged_context=["x", None, value])
    with pytest.raises(ConfigError, match=rf"privileged_context: row 2 has {type(value).__name__} .*json.dumps"):
        SDFT(args).openrlhf_dataset(rows, False, args)


# ── before a run ──


def test_rows_that_the_template_refuses_are_named_before_a_run(preflight, tokenizer, tmp_path):
    """Wherever they are: of each data set the first rows are rendered, and the first of every shape."""
    tokenizer.chat_template = FRAME.format(
        content="{{ raise_exception('no system turns') if m.role == 'system' }}{{ m.content }}"
    )
    plain = [{"prompt": [user("Q?")]}] * (preflight.RENDERED_ROWS + 5)
    late = [*plain, {"prompt": [{"role": "system", "content": "S"}, user("Q?")]}]
    for algorithm in ("sdpo", None):
        for name, rows, refused in (("good", plain, False), ("late", late, True)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            args = arguments(prompt_dataset=f"{tmp_path}/{name}.jsonl", max_samples=1e8)
            args.algo.name = algorithm
            plugins.activate(args)
            if refused:
                with pytest.raises(ConfigError, match=rf"late.jsonl, row {len(plain)}: .*no system turns"):
                    preflight.chats(args, tokenizer)
            else:
                preflight.chats(args, tokenizer)


def test_rows_are_rendered_with_the_teacher_s_arguments_too(preflight, tokenizer, tmp_path):
    tokenizer.chat_template = FRAME.format(content="{{ raise_exception('no depth') if deep }}{{ m.content }}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [user("Q?")]}) + "\n")
    for own in (None, '{"deep": true}'):
        args = arguments(prompt_dataset=f"{tmp_path}/rows.jsonl", max_samples=1e8)
        args.reprompt.chat_template_kwargs = own
        plugins.activate(args)
        if own is None:
            preflight.chats(args, tokenizer)
            continue
        with pytest.raises(ConfigError, match=r"rows.jsonl, row 0: .*no depth"):
            preflight.chats(args, tokenizer)


@pytest.mark.parametrize(
    "template", ['Answer as {"a": 1}. {}\nA:', "Question:", "{} or {}", "{question}", "{", "{0.x}"]
)
def test_an_input_template_needs_one_place_for_the_prompt(preflight, template):
    args = arguments(apply_chat_template=False, input_template=template)
    for reads in (lambda: prompt_messages({"prompt": "2+2?"}, args), lambda: preflight.data(args)):
        with pytest.raises(ConfigError, match=r"--data.input_template .* not exactly one \{\}.*\{\{"):
            reads()
    right = arguments(apply_chat_template=False, input_template='As {{"a": 1}}. {}\nA:')
    assert prompt_messages({"prompt": "2+2?"}, right) == FramedText('As {"a": 1}. ', "2+2?", "\nA:")


def test_a_vision_checkpoint_without_a_processor_is_named(preflight, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    args = arguments()
    args.actor = SimpleNamespace(model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="--actor.model_name_or_path .*vision_config.*processor"):
        preflight.tokenizer(args)
