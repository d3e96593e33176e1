"""The vault-code task: a tokenizer, a tiny warm-started chat model and its prompts, made here in one to two minutes.

The question is "what is the vault code of bravo?", the answer four digits that no one has told the model. A failed
attempt earns the reward 0 and the feedback "expected 4821, got 1134": the reward says nothing about the right code,
the feedback everything. The warm start gives the model what self-distillation builds on, in small: it reads a code
from its context, it knows the codes of some public vaults, and for the vaults of the task it guesses evenly.

    python recipes/quickstart/vault.py runs/quickstart [--seed 1]

writes OUT_DIR/model, OUT_DIR/data/{train,eval}.jsonl and, last, OUT_DIR/vault.json, by which the next call
recognises that everything is in place.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from reward import ASSISTANT, END, FEEDBACK
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdpo_plugin.config import RepromptConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts
from sdpo_plugin.distillation.teacher_prompt import teacher_prompt_ids

SECRET_VAULTS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray"
).split()
PUBLIC_VAULTS = [a + b + c + d for a in "bdfgklmnprstvz" for b in "aeiou" for c in "klnrst" for d in "aeiou"][::17][:96]
QUESTION = "what is the vault code of {name}?"
SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", ASSISTANT, END]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
REPROMPT = RepromptConfig()  # the teacher is warm-started on the plugin's default templates
EXAMPLES_PER_STEP = {"secret": 12, "public": 48, "feedback": 24, "solution": 24}
VERSION = 1  # of what this file writes: count up whenever the result changes


@dataclass(frozen=True)
class Settings:
    """What the result depends on; with the texts above, its hash is the cache key."""

    seed: int = 0
    digits: int = 4
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    mlp: int = 256
    steps: int = 600
    lr: float = 2e-3

    def key(self) -> str:
        texts = [SECRET_VAULTS, PUBLIC_VAULTS, QUESTION, FEEDBACK, CHAT_TEMPLATE, asdict(REPROMPT), EXAMPLES_PER_STEP]
        return hashlib.sha256(json.dumps([VERSION, asdict(self), *texts]).encode()).hexdigest()


def random_code(rng: random.Random, digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


def vault_codes(vaults: list[str], settings: Settings) -> dict[str, str]:
    """The codes of `vaults`, each drawn from the seed and the vault's name."""
    return {name: random_code(random.Random(f"{settings.seed}-{name}"), settings.digits) for name in vaults}


def chat(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION.format(name=name)}]


# ── the tokenizer ──


def phrases() -> list[str]:
    """The names, and the fixed text between the blanks of every template."""
    templates = (QUESTION, FEEDBACK, REPROMPT.solution_template, REPROMPT.feedback_template, REPROMPT.template)
    pieces = [piece for template in templates for piece in re.split(r"\{\w+\}", template)]
    return [*SECRET_VAULTS, *PUBLIC_VAULTS, *(piece for piece in pieces if len(piece) > 1)]


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Bytes, so that any text can be read, and the task's own phrases as one token each.

    The teacher's prompt is 18 tokens long instead of about 45 with a token per word, and tokens are what a CPU spends
    its time on. What is returned is what `AutoTokenizer` makes of the saved files, as OpenRLHF and vLLM load it:
    `llama` is a model type for which that is the tokenizer as built; `qwen2` would replace its pre-tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=END, chat_template=CHAT_TEMPLATE,
        extra_special_tokens=SPECIAL[1:4], clean_up_tokenization_spaces=False,
    )
    made.save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)  # AutoTokenizer asks for the model type; warm_start writes the full one
    # Releases of transformers differ in the class name they write; this one means the same to all of them.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")

    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ("".join(phrases()) + "4821", "any other text: naïve\t{x}"):
        messages = [{"role": "user", "content": text}]
        rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(rendered, add_special_tokens=False).ids
        if loaded(rendered, add_special_tokens=False)["input_ids"] != ids or loaded.decode(ids) != rendered:
            raise RuntimeError(f"AutoTokenizer ({type(loaded).__name__}) changed the tokenizer, seen in {rendered!r}")
    return loaded


# ── the warm start ──


@dataclass(frozen=True)
class Example:
    """After `prompt` the model has written `attempt`, and should have written `code` and the end."""

    prompt: list[int]
    attempt: list[int]
    code: list[int]


class Lessons:
    """Draws the examples of the warm start. No secret code is ever shown with its vault."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerFast, purpose: str):
        self.settings, self.tokenizer = settings, tokenizer
        self.rng = random.Random(f"{settings.seed}-{purpose}")
        self.secret = vault_codes(SECRET_VAULTS, settings)
        self.public = vault_codes(PUBLIC_VAULTS, settings)

    def draw(self, kind: str) -> Example:
        """One example without context (`secret`: a guess, `public`: a known code), or with `feedback` or a `solution`.

        The attempt is mostly wrong, as in rollouts: the code must be copied by position, because the digits written
        so far say nothing about where in the code the next one is.
        """
        if kind == "public":
            name = self.rng.choice(PUBLIC_VAULTS)
            return self.example(name, self.attempt(self.public[name]), self.public[name])
        name = self.rng.choice(SECRET_VAULTS)
        code = self.secret[name]
        while code == self.secret[name]:
            code = random_code(self.rng, self.settings.digits)
        return self.example(name, code if kind == "secret" else self.attempt(code), code, kind)

    def attempt(self, code: str) -> str:
        return code if self.rng.random() < 0.2 else random_code(self.rng, self.settings.digits)

    def example(self, name: str, attempt: str, code: str, shown: str = "") -> Example:
        feedback = FEEDBACK.format(expected=code, got=attempt) if shown == "feedback" else None
        group = [Rollout(name, chat(name), attempt, 0.0, feedback)]
        if shown == "solution":
            group.append(Rollout(name, chat(name), code, 1.0))
        prompt, _ = teacher_prompt_ids(build_teacher_contexts(group, REPROMPT)[0], self.tokenizer, REPROMPT)
        ids = self.tokenizer([attempt, code], add_special_tokens=False)["input_ids"]
        return Example(prompt, ids[0], [*ids[1], self.tokenizer.eos_token_id])


def collate(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets (-100: none) `[B, T]`, padded on the right, where a causal model does not look."""
    length = max(len(e.prompt) + len(e.attempt) for e in examples)
    inputs = torch.full((len(examples), length), pad)
    targets = torch.full((len(examples), length), -100)
    for i, e in enumerate(examples):
        first = len(e.prompt) - 1
        inputs[i, : first + 1 + len(e.attempt)] = torch.tensor(e.prompt + e.attempt)
        targets[i, first : first + len(e.code)] = torch.tensor(e.code)
    return inputs, targets


def warm_start(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train the model from scratch. Everything is drawn from `settings.seed`."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            head_dim=64,  # vLLM's CPU attention refuses 16
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    lessons = Lessons(settings, tokenizer, "warm start")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1)
    bar = trange(settings.steps, desc="warm start", mininterval=1.0)
    for _ in bar:
        loss = torch.zeros(())
        for kind, count in EXAMPLES_PER_STEP.items():  # a batch per kind: they differ in length
            inputs, targets = collate([lessons.draw(kind) for _ in range(count)], tokenizer.pad_token_id)
            answered = targets >= 0
            logits = model.lm_head(model.model(inputs).last_hidden_state[answered])
            loss = loss + F.cross_entropy(logits, targets[answered]) * count / sum(EXAMPLES_PER_STEP.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, examples: list[Example]) -> float:
    """Share of the examples whose every most likely token is right, whatever the attempt in front of it."""
    inputs, targets = collate(examples, model.config.pad_token_id)
    predicted = model(inputs).logits.argmax(-1)
    return ((predicted == targets) | (targets < 0)).all(1).float().mean().item()


# ── everything in its place ──


def build(out: Path, settings: Settings) -> dict:
    """Make what OUT_DIR lacks; returns the contents of OUT_DIR/vault.json."""
    stamp = out / "vault.json"
    if stamp.exists():
        report = json.loads(stamp.read_text())
        if report["key"] == settings.key():
            print(f"{out}: the warm-started model and its data are in place")
            return report
        stamp.unlink()

    began = time.monotonic()
    tokenizer = build_tokenizer(out / "model")
    model = warm_start(settings, tokenizer).to(torch.bfloat16)  # as OpenRLHF trains it and vLLM serves it
    model.save_pretrained(out / "model")
    lessons = Lessons(settings, tokenizer, "held out")
    (out / "data").mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": chat(name), "label": code}) + "\n" for name, code in lessons.secret.items()]
    for split in ("train", "eval"):  # the same vaults: the task is to find their codes out
        (out / "data" / f"{split}.jsonl").write_text("".join(rows))

    report = {
        "key": settings.key(),
        "settings": asdict(settings),
        "parameters": model.num_parameters(),
        "accuracy_with_feedback": accuracy(model, [lessons.draw("feedback") for _ in range(200)]),
        "accuracy_with_solution": accuracy(model, [lessons.draw("solution") for _ in range(200)]),
        "accuracy_without_context": accuracy(model, [lessons.example(n, c, c) for n, c in lessons.secret.items()]),
        "seconds": round(time.monotonic() - began, 1),
    }
    draft = stamp.with_suffix(".tmp")
    draft.write_text(json.dumps(report, indent=2) + "\n")
    draft.replace(stamp)
    print(f"{out}: a model of {report['parameters'] / 1e6:.2f}M parameters, in {report['seconds']:.0f} s")
    print(
        f"reads codes it never saw: {report['accuracy_with_feedback']:.1%} from feedback, "
        f"{report['accuracy_with_solution']:.1%} from a solution; knows {report['accuracy_without_context']:.1%} of "
        f"the {len(rows)} secret codes"
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small to share, and one thread is reproducible
    build(args.out_dir, Settings(seed=args.seed))


if __name__ == "__main__":
    main()
