"""What SDPO learns from pictures: two colored squares, of which the student must find out that the left one counts.

    python tests/slow/images.py [--seeds 1 2 3] [--steps 150]

The feedback says "look left", so only a teacher that sees the picture knows the color. Prints, and writes to
runs/images/found.json, the accuracy on pictures that were not trained on: with SDPO, with GRPO, and with SDPO whose
teacher is shown gray pictures. Some minutes a seed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import trange
from transformers import AutoModelForImageTextToText, AutoProcessor

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.prompts import rendered
from sdpo_plugin.distillation.template import fill
from sdpo_plugin.report import read_scalars
from sdpo_plugin.testing import tiny_vision_model

ROOT = Path(__file__).parents[2]
OUT = ROOT / "runs" / "images"
COLORS = {
    "red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "white": (245, 245, 245),
    "black": (15, 15, 15), "gray": (128, 128, 128), "yellow": (240, 230, 40), "orange": (250, 140, 20),
    "purple": (130, 30, 160), "pink": (250, 160, 200), "brown": (120, 70, 30), "cyan": (40, 220, 230),
}  # fmt: skip
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "color?"}]}]
REPROMPT = RepromptConfig(template="{prompt} {feedback}", feedback_template="{feedback_raw}")
REWARD = '''
def reward_func(queries, prompts, labels):
    import torch
    right = [query.endswith("<|assistant|>" + label + "<eos>") for query, label in zip(queries, labels)]
    reward = torch.tensor([float(r) for r in right])
    return {"rewards": reward, "scores": reward, "feedback": [None if r else "look left" for r in right]}
'''
RUNS = {
    "SDPO": ("--algo", "sdpo"),
    "GRPO": (),
    "SDPO, gray pictures for the teacher": ("--algo", "sdpo", "--plugins", "withheld"),
}


def picture(rng: random.Random, left: str, right: str) -> Image.Image:
    """56 x 28 pixels, two tokens; every square is another shade of its color."""
    whole = Image.new("RGB", (56, 28))
    for at, name in ((0, left), (28, right)):
        shade = tuple(min(max(c + rng.randint(-12, 12), 0), 255) for c in COLORS[name])
        whole.paste(Image.new("RGB", (28, 28), shade), (at, 0))
    return whole


def warm_start(directory: Path, seed: int, steps: int) -> None:
    """Train the model from scratch: told where to look it says that color; told nothing it guesses evenly."""
    tiny_vision_model(directory, seed=seed)
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    rng, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    bar = trange(steps, desc="warm start", mininterval=5.0)
    for _ in bar:
        texts, pictures = [], []
        for _ in range(64):
            left, right, guess = (rng.choice(list(COLORS)) for _ in range(3))
            side = rng.choice(["look left", "look right"] * 2 + [None])
            answer = {"look left": left, "look right": right, None: guess}[side]
            rollout = Rollout(0, QUESTION, guess, 0.0, side)
            (context,) = build_teacher_contexts([rollout], REPROMPT)
            prompt = fill(context.prompt, context.sections, REPROMPT) if context.active else QUESTION
            texts.append((rendered(prompt, processor), answer))
            pictures.append(picture(rng, left, right))
        batch = processor(text=[p + a + "<eos>" for p, a in texts], images=pictures, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        targets = ids.masked_fill(batch["attention_mask"] == 0, -100)
        for row, (_, answer) in zip(targets, texts, strict=True):
            row[: int((row >= 0).nonzero()[-1]) - len(answer)] = -100
        loss = model(**batch, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.to(torch.bfloat16).save_pretrained(directory)


def write_rows(directory: Path, seed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", 240), ("eval", 96)):
        rng, rows = random.Random(f"{seed}-{split}"), []
        for i in range(number):
            left, right = rng.sample(list(COLORS), 2)
            path = directory / f"{split}{i}.png"
            picture(rng, left, right).save(path)
            rows.append(json.dumps({"prompt": QUESTION, "images": [str(path)], "label": left}) + "\n")
        (directory / f"{split}.jsonl").write_text("".join(rows))
    (directory / "reward.py").write_text(REWARD)


def train(name: str, seed: int, steps: int, base: Path) -> list[list[float]]:
    out = base / name.replace(" ", "_").replace(",", "")
    flags = [
        "--platform", "cpu", "--actor.model_name_or_path", base / "model", "--actor.num_gpus_per_node", "1",
        "--data.prompt_dataset", base / "data" / "train.jsonl", "--eval.dataset", base / "data" / "eval.jsonl",
        "--data.input_key", "prompt", "--data.label_key", "label", "--data.apply_chat_template",
        "--data.max_len", "128", "--data.max_images_per_prompt", "1",
        "--reward.remote_url", base / "data" / "reward.py",
        "--rollout.batch_size", "24", "--rollout.n_samples_per_prompt", "4", "--rollout.max_new_tokens", "8",
        "--rollout.micro_batch_size", "96", "--train.batch_size", "96", "--train.micro_batch_size", "48",
        "--train.num_episodes", str(steps // 10), "--eval.steps", "5", "--eval.temperature", "0",
        "--eval.n_samples_per_prompt", "1", "--actor.adam.lr", "1e-3", "--actor.lr_scheduler", "constant",
        "--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", "0", "--vllm.num_engines", "1",
        "--vllm.sync_backend", "gloo", "--vllm.enforce_eager", "--ds.attn_implementation", "sdpa",
        "--train.seed", str(seed), "--logger.tensorboard_dir", out / "tensorboard", "--ckpt.output_dir", out / "model",
        "--ckpt.path", out / "checkpoints", "--ckpt.best_metric_key", "none",
    ]  # fmt: skip
    if "SDPO" in name:
        flags += ["--teacher.kind", "base", "--distill.mode", "full", "--distill.alpha", "0",
                  "--reprompt.template", REPROMPT.template,
                  "--reprompt.feedback_template", REPROMPT.feedback_template]  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sdpo_plugin", "train", *map(str, flags), *RUNS[name]]
    with open(out / "log.txt", "w") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "plugins")}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return read_scalars(str(out / "tensorboard"))["eval/eval_default_pass1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm-up", type=int, default=3000)
    args = parser.parse_args()
    found: dict[str, list[list[list[float]]]] = {name: [] for name in RUNS}
    for seed in args.seeds:
        base = OUT / f"seed{seed}"
        if not (base / "data" / "reward.py").exists():
            warm_start(base / "model", seed, args.warm_up)
            write_rows(base / "data", seed)
        for name in RUNS:
            found[name].append(train(name, seed, args.steps, base))
            print(name, seed, found[name][-1], flush=True)
    (OUT / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
