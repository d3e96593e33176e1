"""What the controller does between rewards and training: `openrlhf_rollout_batch`, by part.

    RAYON_NUM_THREADS=1 python tests/slow/bench/controller.py [--samples 256] [--tokens 8192] [--contexts solution]

Without OpenRLHF: a batch of made-up samples, and a byte-level BPE tokenizer of 151,643 tokens, as large as Qwen3's,
which is trained on the sources of Python's standard library (a minute, once; kept in runs/bench/). Prompts have
`--prompt` tokens; `--contexts` says what the teacher is shown:

    solution   half of each group succeeds; siblings share the demonstration, a whole response
    feedback   nothing succeeds; each sample has 64 tokens of feedback of its own
    attempt    feedback, and the response itself ({attempt}): nothing is shared

Prints the CPU seconds of each part, of all threads together, and what they make for 1,024 samples. Tokenizers use a
thread for each core, and the figure of one core is that with RAYON_NUM_THREADS=1; "in threads" is the part that is
divided among them, so N cores take about the rest + that part / N. Adds a row to runs/bench/controller.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sysconfig
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.distillation import thinking
from sdpo_plugin.distillation.teacher_prompt import TeacherPrompts
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Turn
from sdpo_plugin.testing import fake_worker

OUT = Path(__file__).parents[3] / "runs" / "bench"
VOCABULARY = 151_643
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|reserved_{i}|>" for i in range(17))]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
ATTEMPT = "{prompt}\n\nYour attempt:\n\n{attempt}{feedback}\n\nCorrectly solve the original question."
# Methods of the algorithm that make up `openrlhf_rollout_batch`.
PARTS = {
    "rollouts": "prompts as the student has them, and the texts of responses",
    "teacher_contexts": "who is shown what",
    "_attach_teacher_prompts": "the teacher's prompts as token ids",
    "_check_batch": "the collapse monitor",
}


def corpus(size: int) -> str:
    """Python's standard library, in a fixed order, up to a size in characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    for file in files:
        texts.append(file.read_text(errors="ignore"))
        if (size := size - len(texts[-1])) < 0:
            break
    return "\n".join(texts)


def tokenizer() -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    file = OUT / "tokenizer.json"
    if not file.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        words = Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        )
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([corpus(60_000_000)], trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False,
        ))  # fmt: skip
        made.save(str(file))
    made = Tokenizer.from_file(str(file))
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made.add_tokens([AddedToken(text, special=False) for text in MARKUP])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML)


def batch(args: Any, tokenizer: Any, options: argparse.Namespace) -> RolloutBatch:
    """Samples whose prompts and responses are pieces of the corpus."""
    ids = tokenizer(corpus(8 * options.tokens * 40), add_special_tokens=False, verbose=False)["input_ids"]
    pick, end = random.Random(1), tokenizer.eos_token_id

    def piece(length: int) -> list[int]:
        start = pick.randrange(len(ids) - length)
        return ids[start : start + length]

    samples, rewards = [], []
    for i in range(options.samples):
        if i % options.group == 0:
            prompt = [{"role": "user", "content": tokenizer.decode(piece(options.prompt))}]
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            before = tokenizer(text, add_special_tokens=False)["input_ids"]
        sequence = [*before, *piece(options.tokens - 1), end]
        mask = torch.zeros(1, len(sequence) - 1, dtype=torch.long)
        mask[0, len(before) - 1 :] = 1
        feedback = None if options.contexts == "solution" else tokenizer.decode(piece(64))
        samples.append(SimpleNamespace(
            sequences=torch.tensor([sequence]), action_mask=mask, truncated=torch.tensor([False]), feedback=feedback,
            record={"prompt": list(map(dict, prompt))}, turns=[Turn(len(before) - 1, len(sequence) - 1)],
        ))  # fmt: skip
        rewards.append(float(options.contexts == "solution" and i % 2 == 0))
    experiences = [
        SimpleNamespace(index=[i], rewards=torch.tensor([reward]), info={}) for i, reward in enumerate(rewards)
    ]
    return RolloutBatch(samples, experiences, args, tokenizer, float("inf"))


def timed(owner: Any, name: str, spent: dict[str, float], part: str) -> None:
    """Let a function add its CPU seconds to `spent[part]`."""
    own = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return own(*args, **kwargs)
        finally:
            spent[part] += time.process_time() - start

    setattr(owner, name, measured)


def run(algorithm: Any, made: RolloutBatch, spent: dict[str, float]) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    algorithm.openrlhf_rollout_batch(made)
    spent["all"], spent["all, by the clock"] = time.process_time() - cpu, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of a response")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--contexts", choices=("solution", "feedback", "attempt"), default="solution")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    reprompt: dict[str, Any] = {"max_len": 2 * options.tokens + 2 * options.prompt}
    if options.contexts == "attempt":
        reprompt["template"] = ATTEMPT
    args = fake_worker(
        reprompt=reprompt, rollout={"n_samples_per_prompt": options.group, "batch_size": options.samples},
        train={"batch_size": options.samples, "max_epochs": 1},
    ).args  # fmt: skip
    tokens = tokenizer()
    best: dict[str, float] = {}
    for _ in range(options.repeat):
        made, algorithm = batch(args, tokens, options), SDPO(args)
        spent: dict[str, float] = defaultdict(float)
        for name in PARTS:
            timed(algorithm, name, spent, name)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((TeacherPrompts, "_encode"), (thinking, "_decoded")):
                patch.setattr(owner, name, getattr(owner, name))  # undone below
                timed(owner, name, spent, "in threads")
            run(algorithm, made, spent)
        spent["everything else"] = spent["all"] - sum(spent[name] for name in PARTS)
        best = min(best or spent, spent, key=lambda found: found["all"])
    threads = int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count() or 1))
    print(f"{options.samples} samples of {options.tokens} tokens, {options.contexts}, {threads} threads")
    for name, seconds in best.items():
        print(f"{name:>24} {seconds:7.2f} s, of 1,024 {seconds * 1024 / options.samples:7.1f} s  {PARTS.get(name, '')}")
    rest = best["all"] - best["in threads"]
    sixteen = (rest + best["in threads"] / 16) * 1024 / options.samples
    print(f"1,024 samples on 16 cores, if threads divide their part evenly: {sixteen:.1f} s")
    file = OUT / "controller.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows.append({**vars(options), "threads": threads, "seconds": best})
    file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
