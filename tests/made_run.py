"""Runs as they are logged, made by hand: for the report's tests, which need no training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

BEGAN = 1_700_000_000.0
SAMPLES_A_STEP = 96
HOSTILE = (
    "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'></script><!--<script>"
    "\u202egnp.exe\u202c \x1b[31mred\x1b[0m\x1b]0;title\x07 \x00 \x9b31m \ud800 \u2066isolated\u2069 \u2028 {{ 7 * 7 }}"
)


def log(directory: Path, scalars: dict[str, list[tuple[int, float]]], step_seconds: float = 2.0) -> Path:
    """Event files with `scalars`, a step every `step_seconds`."""
    with SummaryWriter(directory / "tensorboard" / "ppo_1") as writer:
        for tag, points in scalars.items():
            for step, value in points:
                writer.add_scalar(tag, value, step, walltime=BEGAN + step * step_seconds)
    return directory


def curves(steps: int, collapses: bool = False, seed: int = 0) -> dict[str, list[tuple[int, float]]]:
    """What a run of self-distillation logs: it learns, or its teacher forgets to read its context."""
    draw = random.Random(seed)
    every = range(1, steps + 1)

    def curve(function: Any, noise: float = 0.0) -> list[tuple[int, float]]:
        return [(step, function(step / steps) + noise * (draw.random() - 0.5)) for step in every]

    def rise(x: float) -> float:
        return 0.3 * math.exp(-((x - 0.45) ** 2) / 0.02) if collapses else 1 / (1 + math.exp(8 - 16 * x))

    def kl(x: float) -> float:
        return 1.8 / (1 + math.exp(22 * (x - 0.5))) if collapses else 1.83

    evaluated = range(max(steps // 12, 1), steps + 1, max(steps // 12, 1))
    warnings = [(step, float(collapses and step >= 0.5 * steps and step % 5 == 0)) for step in every]
    return {
        "eval/eval_default_pass1": [(step, rise(step / steps)) for step in evaluated],
        "train/rollout/reward_mean": curve(lambda x: 0.9 * rise(x), 0.05),
        "train/rollout/num_samples": curve(lambda x: float(SAMPLES_A_STEP)),
        "train/rollout/truncated_rate": curve(lambda x: 0.02, 0.02),
        "train/self_distillation/loss": curve(lambda x: 1.85 * math.exp(-5 * x), 0.05),
        "train/actor_grad_norm": curve(lambda x: 1.2 * math.exp(-3 * x), 0.1),
        "train/teacher/context_kl": curve(kl, 0.06),
        "train/teacher/log_ratio_on_failures": curve(lambda x: -5.0 * math.exp(-3 * x), 0.3),
        "train/self_distillation/student_entropy": curve(lambda x: 1.9 * math.exp(-4 * x), 0.05),
        "train/self_distillation/response_length_drift": curve(lambda x: 1.0, 0.1),
        "train/self_distillation/reprompt_sample_fraction": curve(lambda x: 1.0),
        "train/warning/collapse": warnings,
        "train/warning/inactive": curve(lambda x: 0.0),
        "train/timing/generation": curve(lambda x: 0.22, 0.04),
        "train/timing/make_experience": curve(lambda x: 0.05, 0.01),
        "train/timing/ppo_train": curve(lambda x: 0.13, 0.02),
        "train/timing/broadcast": curve(lambda x: 0.09, 0.02),
        "train/timing/step_total": curve(lambda x: 0.53, 0.06),
    }  # fmt: skip


def sample(step: int, number: int = 0, **changed: Any) -> dict[str, Any]:
    """One line of `samples.jsonl`: a vault's code, guessed at first and known at the end."""
    draw = random.Random(1000 * step + number)
    known = step / 40
    code = f"{4821 + 1111 * number}"
    said = "".join(digit if draw.random() < known else str(draw.randrange(10)) for digit in code)
    tokens = [*said, "<|im_end|>"]
    student = [round(math.log(max(min(known + 0.1 * draw.random(), 0.99), 0.06)), 4) for _ in tokens]
    teacher = [-0.02 if got == right else -4.5 for got, right in zip(tokens, [*code, "<|im_end|>"], strict=True)]
    prompt = f"<|im_start|>user\nwhat is the vault code of vault-{number}?<|im_end|>\n<|im_start|>assistant\n"
    feedback = None if said == code else f"expected {code}, got {said}"
    context = f"\n\nThe attempt before was wrong: {feedback}" if feedback else f"\n\nA right answer: {code}"
    made = {
        "step": step, "sample": number, "prompt": prompt, "response": said + "<|im_end|>",
        "reward": float(said == code), "feedback": feedback, "active": True, "truncated": False,
        "teacher_prompt": prompt.replace("?", "?" + context), "truncated_at": {}, "tokens": tokens,
        "token_ids": list(range(len(tokens))), "in_loss": [True] * len(tokens), "student": student, "teacher": teacher,
        "alternatives": [
            [[right, -0.02], ["7", -4.5], ["3", -5.0], ["0", -5.5], [" ", -6.0]] for right in [*code, "<|im_end|>"]
        ],
    }  # fmt: skip
    return made | changed


def hostile(step: int) -> dict[str, Any]:
    """A sample whose every text would do harm if it could."""
    tokens = [HOSTILE, "\u202e", "\x1b[2J", "", "\n", *("x" * 5 for _ in range(20))]
    count = len(tokens)
    return sample(
        step, 9, prompt=[{"role": "user", "content": HOSTILE}], response=HOSTILE, feedback=HOSTILE,
        teacher_prompt=HOSTILE, truncated_at={"feedback": [7], HOSTILE: [12]}, tokens=tokens, token_ids=[0] * count,
        in_loss=[True] * (count - 1) + [False], student=[-1.0] * count, teacher=[-3.0] * count,
        alternatives=[[[HOSTILE, -0.1], ["\u202e", -3.0]]] * count,
    )  # fmt: skip


def record(directory: Path, samples: list[dict[str, Any]]) -> Path:
    """`samples.jsonl` beside the event files. Halves of surrogate pairs are written as JSON's escapes."""
    file = directory / "tensorboard" / "ppo_1" / "samples.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return directory


def two_runs(directory: Path) -> list[str]:
    """One run that learns, with samples, and one that collapses; as arguments of `openrlhf-sdpo report`."""
    samples = [sample(step, number) for step in range(1, 61, 6) for number in range(4)]
    record(log(directory / "base", curves(60)), samples)
    log(directory / "ema", curves(40, collapses=True, seed=1))
    return [f"base={directory / 'base'}", f"ema 0.05={directory / 'ema'}"]
