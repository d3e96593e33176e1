"""What the models of `make demo-lm` answer to requests that none of them was trained on.

    python recipes/smart_home/ask.py OUT_DIR

Prints and writes OUT_DIR/answers.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from house import SAID_LATER, accuracy, answers, rows
from reward import answer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: Path) -> None:
    asked = rows()["eval"]
    said, right = {}, {}
    for name, path in {"before": out / "model", "sdpo": out / "sdpo/model", "grpo": out / "grpo/model"}.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        said[name] = answers(model, tokenizer, [row["prompt"] for row in asked])
        right[name] = accuracy(said[name], asked)
    lines = ["| request | " + " | ".join(f"{name}: {right[name]:.0%}" for name in said) + " |", "| --- " * 4 + "|"]
    for i in range(len(SAID_LATER)):
        request = asked[i]["prompt"][-1]["content"]
        lines.append(f"| {request} | " + " | ".join(f"`{answer(texts[i])}`" for texts in said.values()) + " |")
    text = "\n".join(lines) + "\n"
    (out / "answers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
