"""What a demonstration shows of a response: the answer without its thoughts, in known forms and in others."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdpo_plugin.config import ConfigError, RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts, context_metrics
from sdpo_plugin.distillation.thinking import (
    JUDGED_TAGS,
    KNOWN_TAGS,
    response_text,
    response_texts,
    tags_with,
    visible,
    without_thoughts,
)
from sdpo_plugin.environments import choice, code, maths, structure, tool_calls

HARMONY = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"]


def demonstrated(response, **options):
    """What the teacher of a failed sibling is shown, and whether it counts as a thought without an end."""
    config = RepromptConfig(**options)
    batch = [Rollout(0, "Q?", response, 1.0), Rollout(0, "Q?", "no", 0.0)]
    contexts = build_teacher_contexts(batch, config)
    unclosed = context_metrics(batch, contexts, config)["self_distillation/unclosed_thought_fraction"]
    return contexts[1].sections["solution"], unclosed == 0.5


@pytest.mark.parametrize("opening, closing", KNOWN_TAGS)
def test_known_forms(opening, closing):
    assert demonstrated(f"{opening}\nHm, 4?\n{closing}\n\nIt is 4.") == ("It is 4.", False)
    assert demonstrated(f"Hm, 4?\n{closing}\n\nIt is 4.") == ("It is 4.", False)  # the prompt has the opening tag
    assert demonstrated(f"So {opening}a{closing} it {opening}b{closing} is") == ("So it is", False)
    endless = f"{opening}Hm, hm"
    assert demonstrated(endless) == (endless, True)
    assert demonstrated(f"{opening}a{closing}4", remove_thinking=False)[0] == f"{opening}a{closing}4"


READERS = {
    choice.choice: ("The answer is A", "B", "B"),
    maths.answer: ("\\boxed{8}", "The answer is 7.", "7"),
    code.extract: ("```python\nprint(8)\n```", "```python\nprint(7)\n```", "print(7)\n"),
    structure.parse: ("[8]", "```json\n[7]\n```", [7]),
    tool_calls.parse: ("<tool_call>[f(x=8)]</tool_call>", "[f(x=7)]", [("f", {"x": 7})]),
}


@pytest.mark.parametrize("opening, closing", JUDGED_TAGS)
@pytest.mark.parametrize("reader", READERS)
def test_what_a_judge_reads(reader, opening, closing):
    thought, shown, found = READERS[reader]
    for hidden in (f"{opening}{thought}{closing}", f"{thought}\n{closing}\n", f"{opening}{thought}\n{closing}\n\n"):
        assert reader(f"{hidden}{shown}") == found
    for nothing in (f"{opening}\n{thought}", f" {opening}{thought}\n{shown}", f"{opening}{thought}{closing}"):
        try:
            assert not reader(nothing)
        except ValueError:  # of structure and tool_calls: it is no JSON, and no call
            pass


def test_an_opening_tag_in_a_line_is_text():
    program = 's = input()\nprint("<think>" + s)\n'
    assert code.extract(f"<think>Hm.</think>\n```python\n{program}```") == program
    assert visible("It is 4.\n  <think>Or 5").strip() == "It is 4."


def test_forms_of_one_s_own():
    response = "<reasoning>Hm.</reasoning> <plan>x</plan> <think>y</think>4"
    assert demonstrated(response)[0] == "<reasoning>Hm.</reasoning> <plan>x</plan> 4"
    tags = "<reasoning> </reasoning>\n<plan> </plan>"
    assert demonstrated(response, thinking_tags=tags) == ("4", False)
    assert demonstrated("<plan>x", thinking_tags=tags) == ("<plan>x", True)
    for wrong in ("", "<plan>", "<a> </a> <b>"):
        with pytest.raises(ConfigError, match="--reprompt.thinking_tags .*pairs of an opening and a closing tag"):
            RepromptConfig(thinking_tags=wrong)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", " ", "\n", "a", "b"]), max_size=12))
def test_the_scan_finds_what_the_published_expression_finds(pieces):
    text = "".join(pieces)
    left = re.sub(r"<think>.*?</think>\s*", "", text, flags=re.DOTALL)
    _, closing, answer = left.rpartition("</think>")
    assert without_thoughts(text, (("<think>", "</think>"),)) == (answer.lstrip() if closing else left)


@pytest.mark.parametrize(
    "hostile", ["<think>", "</think>", "<think></think>", "<think> </think>\n\n  ", "<|channel|>", "[THINK]x", " ", "<"]
)
def test_time_is_linear(hostile):
    def seconds(length):
        text = hostile * (length // len(hostile))
        best = 9.0
        for _ in range(3):
            began = time.process_time()
            without_thoughts(text)
            best = min(best, time.process_time() - began)
        return best

    assert seconds(800_000) < 4 * seconds(400_000) + 0.05  # 2 if linear; the expression took seconds for 30,000


# ── special tokens ──


def tokenizer(special):
    characters = {character: i for i, character in enumerate(["\n", *map(chr, range(32, 127))])}
    own = Tokenizer(models.BPE(vocab=characters, merges=[]))
    own.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
    wrapped.add_special_tokens({"additional_special_tokens": special})
    return wrapped


@pytest.mark.parametrize(
    "special, response, text, answer",
    [
        (["[THINK]", "[/THINK]"], "[THINK]Hm.[/THINK]It is 4.<eos>", "[THINK]Hm.[/THINK]It is 4.", "It is 4."),
        (["<think>", "</think>"], "Hm.\n</think>\n\n4<eos>", "Hm.\n</think>\n\n4", "4"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "<|channel|>analysis<|message|>Hm.assistant<|channel|>final<|message|>4", "4",
        ),
        (HARMONY, "<|channel|>final<|message|>4<|return|>", "<|channel|>final<|message|>4", "4"),
        (["<|channel>", "<channel|>", "<turn|>"], "<|channel>thought\nHm.<channel|>4<turn|>", None, "4"),
        (["<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>"],
         "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>4<eos>", None, "4"),
        (["<tool>"], "<tool>4<eos>", "4", "4"),
    ],
)  # fmt: skip
def test_special_tokens_of_thoughts_stay_until_the_thought_is_cut(special, response, text, answer):
    own = tokenizer(special)
    ids = own(response, add_special_tokens=False)["input_ids"]
    assert own.decode(ids) == response and len(ids) < len(response)
    found = response_text(ids, own)
    assert text in (None, found)
    assert demonstrated(found)[0] == answer


def test_special_tokens_of_one_s_own_form():
    own = tokenizer(["<plan>", "</plan>"])
    ids = own("<plan>Hm.</plan>4<eos>", add_special_tokens=False)["input_ids"]
    assert response_text(ids, own) == "Hm.4"
    assert response_text(ids, own, tags_with("<plan> </plan>")) == "<plan>Hm.</plan>4"


def test_without_such_tokens_a_response_is_decoded_as_ever():
    own = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    assert response_text([0, 1, 2, 0], wrapped) == wrapped.decode([0, 1, 2, 0], skip_special_tokens=True)


@pytest.mark.parametrize("cleans", [True, False])
def test_many_responses_are_decoded_as_each_alone_is(cleans):
    """WordPiece, of which transformers cleans up spaces after the Rust library, and a tag in one of them."""
    words = ["a", "dog", ".", "don", "'", "t", "<pad>", "<unk>", "[THINK]", "[/THINK]"]
    own = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", pad_token="<pad>", clean_up_tokenization_spaces=cleans,
        additional_special_tokens=["[THINK]", "[/THINK]"],
    )  # fmt: skip
    responses = [[0, 1, 2, 6], [3, 4, 5], [], [8, 0, 9, 1, 2], [0] * 3]
    texts = response_texts(responses, wrapped)
    assert texts == [response_text(ids, wrapped) for ids in responses]
    assert [texts[i] for i in (0, 1, 2, 4)] == [
        wrapped.decode(responses[i], skip_special_tokens=True) for i in (0, 1, 2, 4)
    ]
    assert texts[0] == ("a dog." if cleans else "a dog .") and texts[3].startswith("[THINK]a[/THINK]")
