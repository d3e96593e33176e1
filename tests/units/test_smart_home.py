"""The task of `make demo-lm`: what is held out, and what the house says."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "smart_home"


@pytest.fixture
def house(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("house", "reward"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import house

    yield house
    for name in ("house", "reward"):
        sys.modules.pop(name)


def test_what_is_evaluated_was_never_trained_on(house):
    rows = house.rows()
    places = {split: {row["label"].rpartition("/")[0] for row in rows[split]} for split in rows}
    assert not places["train"] & places["eval"]
    assert {part for place in places["eval"] for part in place.split("/")} <= {
        part for place in places["train"] for part in place.split("/")
    }
    said = {split: {row["prompt"][-1]["content"] for row in rows[split]} for split in rows}
    assert len(said["train"]) == len(rows["train"]) and not said["train"] & said["eval"]
    assert len(rows["eval"]) == house.EVALUATED and json.dumps(rows) == json.dumps(house.rows())


def test_the_house_reads_the_first_line_and_says_what_it_expects(house):
    from reward import reward_func

    prompt, label = "<|im_start|>user\nLamp!<|im_end|>\n<|im_start|>assistant\n", "#kitchen/lamp/on"
    said = ["#kitchen/lamp/on", "#kitchen/lamp/on<|im_end|>", "\n#kitchen/lamp/on \nRepeat", "The lamp is on.", ""]
    found = reward_func([prompt + text for text in said], [prompt] * 5, [label] * 5)
    assert found["rewards"].tolist() == [1, 1, 1, 0, 0]
    assert found["feedback"] == [None] * 3 + ["Unknown command. The command is:\n#kitchen/lamp/on"] * 2


def test_answers_of_prompts_of_different_length_are_the_answers_of_each_alone(house, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sdpo_plugin.testing import tiny_model

    path = tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float(), AutoTokenizer.from_pretrained(path)
    chats = [house.chat("Turn on the lamp in the kitchen, please."), house.chat("Fan!")]
    assert house.answers(model, tokenizer, chats) == [house.answers(model, tokenizer, [chat])[0] for chat in chats]
