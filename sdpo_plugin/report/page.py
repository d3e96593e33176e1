"""The page: one HTML file with curves and samples, which needs nothing else.

Text of rollouts reaches the page as JSON in a data block, and the document as text nodes: none is ever parsed as HTML.
The page's policy lets nothing run but the page's own scripts, by their hashes, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import vl_convert
from markupsafe import Markup

import sdpo_plugin
from sdpo_plugin.config import ConfigError
from sdpo_plugin.monitoring.collapse import COLLAPSED, CONTEXT_KL, REFERENCE_CHECKS, WARNING
from sdpo_plugin.monitoring.sample_file import NAME
from sdpo_plugin.report.events import STEP_TOTAL, Run, first_checks, running_median, thinned
from sdpo_plugin.report.readable import LEVELS, disagreement, last_content, prompt_text, token_text, visible

MOST_POINTS = 1_000  # of a curve
MOST_TOKENS = 4_000  # of a response
MOST_CHARACTERS = 20_000  # of a text
LONGEST_PIECE = 200  # characters of a token
MOST_BYTES = 12_000_000  # of all samples
SELF = "train/self_distillation/"
EXPORTED = "window.vegaEmbed = vegaEmbed"  # what charts.js calls
ACCURACY = r"eval/eval_(.+)_pass\d+"

Samples = Sequence[dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Chart:
    """One metric of all runs: `low` to `high` is the healthy range, where there is one."""

    title: str
    words: str
    tag: str
    low: float | None = None
    high: float | None = None
    percent: bool = False


KL_FRACTION = "context KL fraction"  # computed, no tag
LEARNING = (
    Chart("Mean reward", "of a step's samples", "train/rollout/reward_mean"),
    Chart("Self-distillation loss", "near zero at success and at collapse: see the collapse monitor", SELF + "loss"),
    Chart("Gradient norm", "before clipping", "train/actor_grad_norm"),
)
MONITOR = (
    Chart(
        "Context KL", f"as a fraction of the first {REFERENCE_CHECKS} checks; falls as the teacher ignores its context",
        KL_FRACTION, low=COLLAPSED, percent=True,
    ),
    Chart(
        "Log ratio on failures", "log T \u2212 log S, nats per token; below zero: unlikely to the teacher",
        "train/teacher/log_ratio_on_failures", high=0.0,
    ),
    Chart(
        "Log ratio on successes", "log T \u2212 log S, nats per token; about zero or above",
        "train/teacher/log_ratio_on_successes",
    ),
    Chart(
        "Entropy of the student", "nats per token; at zero while samples fail, no other response is tried",
        SELF + "student_entropy",
    ),
    Chart(
        "Response length", "relative to the first checks; half to double is a rule of thumb, without a warning",
        SELF + "response_length_drift", low=0.5, high=2.0, percent=True,
    ),
    Chart(
        "Samples with a teacher", "with a context and a token in the loss; at zero nothing is distilled",
        SELF + "reprompt_sample_fraction", low=0.001, percent=True,
    ),
    Chart("Truncated responses", "at the length limit", "train/rollout/truncated_rate", percent=True),
    Chart("Truncated teacher prompts", "to fit --reprompt.max_len", SELF + "truncated_fraction", percent=True),
    Chart("EMA distance", "relative, between student and EMA teacher", "train/teacher/ema_distance"),
    Chart("EMA rate", "in use; --diagnostics.on_collapse slow lowers it", "train/teacher/update_rate"),
)  # fmt: skip
WARNINGS = {
    "collapse": "the teacher uses its context less and less",
    "no_context_kl": "the teacher's context changes nothing",
    "inactive": "no sample has a teacher context, nothing is distilled",
    "feedback_off": "there is feedback, and it is ignored",
    "flat_rewards": "all rewards are equal, so the policy loss has no effect",
    "flat_successes": "all rewards are equal and count as success",
}


def write(runs: Sequence[tuple[Run, Samples]], path: Path) -> None:
    """Write the page of some runs and their samples, UTF-8.

    Raises ConfigError for samples that do not have the format of docs/monitoring.md.
    """
    room = MOST_BYTES // len(runs)
    vocabulary: dict[str, int] = {}
    shown = [{"name": visible(run.name), **_samples(run, samples, room, vocabulary)} for run, samples in runs]
    curves = {
        "runs": [_run(run) for run, _ in runs], "sections": _sections([run for run, _ in runs]), "warnings": WARNINGS,
        "most": MOST_POINTS,
    }  # fmt: skip
    pieces = [token_text(piece[:LONGEST_PIECE]) for piece in vocabulary]
    samples = {"runs": shown, "vocabulary": pieces, "levels": LEVELS}
    path.write_text(_render(curves, samples), encoding="utf-8")


def _render(curves: dict[str, Any], samples: dict[str, Any]) -> str:
    def own(name: str) -> str:
        return (resources.files(__package__) / name).read_text(encoding="utf-8")

    scripts = [vl_convert.javascript_bundle(EXPORTED), *map(own, ("dom.js", "charts.js", "samples.js"))]
    if any("</script" in text.lower() or "<!--" in text for text in scripts):
        raise ValueError("a script of the page would end its element")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(own("page.html")).render(
        css=Markup(own("page.css")), curves=_block(curves), samples=_block(samples),
        scripts=[Markup(text) for text in scripts],
        hashes=[base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts],
        names=[run["name"] for run in curves["runs"]], version=sdpo_plugin.__version__,
    )  # fmt: skip


def _block(data: dict[str, Any]) -> Markup:
    """JSON for a data block, in ASCII: no text in it can end the block, and halves of surrogate pairs have no UTF-8."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


# --- curves ---------------------------------------------------------------------------------------------------------


def _sections(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Charts of each section, of what at least one run logged."""
    evaluated = sorted({name for run in runs for name in run.matching(ACCURACY)})
    tags = {tag for run in runs for tag in run.curves}
    accuracy = [
        Chart(
            "Accuracy" if evaluated == ["default"] else f"Accuracy, {visible(name)}", "of the evaluation", tag,
            percent=True,
        )
        for name in evaluated
        for tag in sorted(tags)
        if tag.startswith(f"eval/eval_{name}_pass")
    ]  # fmt: skip
    present = tags | ({KL_FRACTION} if f"train/{CONTEXT_KL}" in tags else set())
    sections = {"learning": (*accuracy, *LEARNING), "monitor": MONITOR}
    seconds = Chart("Seconds a step", "generation and weight sync included", STEP_TOTAL)
    found = {name: [vars(c) for c in charts if c.tag in present] for name, charts in sections.items()}
    monitored = {chart["tag"] for chart in found["monitor"]} - {"train/rollout/truncated_rate"}
    found["monitor"] = found["monitor"] if monitored else []
    return {**found, "time": [vars(seconds)] if STEP_TOTAL in tags else []}


def _run(run: Run) -> dict[str, Any]:
    drawn = {chart.tag for chart in (*LEARNING, *MONITOR)} | {STEP_TOTAL} | {
        tag for tag in run.curves if tag.startswith("eval/")
    }  # fmt: skip
    curves = {tag: curve for tag, curve in run.curves.items() if tag in drawn}
    kls = run.curves.get(f"train/{CONTEXT_KL}")
    if kls and first_checks(kls, REFERENCE_CHECKS):
        reference = first_checks(kls, REFERENCE_CHECKS)
        curves[KL_FRACTION] = [(s, kl / reference) for s, kl in running_median(kls, REFERENCE_CHECKS)]
    finite = {tag: [(s, v) for s, v in curve if math.isfinite(v)] for tag, curve in curves.items()}
    points = {tag: thinned(curve, MOST_POINTS) for tag, curve in finite.items() if curve}
    steps = sorted({step for curve in points.values() for step, _ in curve} | {step for step, _ in _warnings(run)})
    logged = [step for curve in run.curves.values() for step, _ in curve]
    return {
        "name": visible(run.name),
        "directory": visible(str(run.directory)),
        "steps": len({step for step in logged}),
        "last": max(logged),
        "axes": {
            "step": steps,
            "generations": [run.generations[step] for step in steps] if run.generations else None,
            "hours": [round(run.hours[step], 5) for step in steps],
        },
        "curves": {tag: [[s for s, _ in c], [float(f"{v:.5g}") for _, v in c]] for tag, c in points.items()},
        "longest": max(len(curve) for curve in run.curves.values()),
        "warnings": [[step, visible(name)] for step, name in _warnings(run)],
        "monitored": any(tag.startswith("train/" + WARNING) for tag in run.curves),
        "kl": kls[0][1] if kls else None,
        "timing": _timing(run),
    }


def _warnings(run: Run) -> list[tuple[int, str]]:
    """The steps and names of warnings, in the order of steps."""
    named = run.matching(f"train/{WARNING}(.+)")
    return sorted((step, name) for name, curve in named.items() for step, value in curve if value)


def _timing(run: Run) -> list[list[Any]]:
    """Name and median seconds of each part of a step, without the first step, which warms up, if there are more."""
    curves = run.matching("train/timing/(.+)")
    medians = {name: statistics.median(seconds for _, seconds in c[1:] or c) for name, c in curves.items()}
    total = medians.pop("step_total", None)
    rest = 0.0 if total is None else total - sum(medians.values())
    parts = sorted(medians.items(), key=lambda part: -part[1])
    return [[visible(name), round(seconds, 4)] for name, seconds in [*parts, *([("other", rest)] if rest > 0 else [])]]


# --- samples --------------------------------------------------------------------------------------------------------


def _samples(run: Run, samples: Samples, room: int, vocabulary: dict[str, int]) -> dict[str, Any]:
    """A run's samples as the page has them: of evenly spaced steps, as many as `room` bytes hold."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps = sorted(by_step)
    sizes = {step: sum(_read(run, sample, _size) for sample in by_step[step]) for step in steps}
    stride = 1
    while stride < len(steps) and sum(sizes[step] for step in _every(steps, stride)) > room:
        stride += 1
    prompts: dict[tuple[str, str | None], int] = {}
    shown: list[dict[str, Any]] = []
    used = 0
    for sample in (sample for step in _every(steps, stride) for sample in by_step[step]):
        used += _size(sample)
        if used > room and shown:
            break
        shown.append(_read(run, sample, lambda sample: _sample(sample, prompts, vocabulary)))
    return {"recorded": len(samples), "steps": len(steps), "stride": stride, "prompts": list(prompts), "shown": shown}


def _read(run: Run, sample: dict[str, Any], function: Callable[[dict[str, Any]], T]) -> T:
    try:
        return function(sample)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = f"{run.directory}, {NAME}, step {sample['step']}, sample {sample.get('sample')}"
        raise ConfigError(f"report: {where}: not in the format of docs/monitoring.md ({error!r:.200})") from error


def _every(steps: Sequence[int], stride: int) -> list[int]:
    """Every so many steps, and the last."""
    return sorted({*steps[::stride], *steps[-1:]})


def _size(sample: dict[str, Any]) -> int:
    """About how many bytes a sample takes in the page."""
    texts = (prompt_text(sample["prompt"]), sample["response"], sample["feedback"], sample["teacher_prompt"])
    characters = sum(min(len(text or ""), MOST_CHARACTERS) for text in texts)
    return 200 + characters + min(len(sample["tokens"]), MOST_TOKENS) * (90 if sample["alternatives"] else 25)


def _sample(
    sample: dict[str, Any], prompts: dict[tuple[str, str | None], int], vocabulary: dict[str, int]
) -> dict[str, Any]:
    def known(piece: str) -> int:
        return vocabulary.setdefault(piece, len(vocabulary))

    mean, last = disagreement(sample), last_content(sample["prompt"])
    last = None if last is None else visible(last[:MOST_CHARACTERS])
    return {
        "step": int(sample["step"]),
        "sample": int(sample["sample"]),
        "prompt": prompts.setdefault((_bounded(prompt_text(sample["prompt"])), last), len(prompts)),
        "response": _bounded(sample["response"]),
        "reward": _rounded([sample["reward"]])[0],
        "feedback": None if sample["feedback"] is None else _bounded(sample["feedback"]),
        "active": bool(sample["active"]),
        "truncated": bool(sample["truncated"]),
        "teacher_prompt": None if sample["teacher_prompt"] is None else _bounded(sample["teacher_prompt"]),
        "truncated_at": {
            visible(str(name)): _places(sample["teacher_prompt"], at) for name, at in sample["truncated_at"].items()
        },
        "length": len(sample["tokens"]),
        "tokens": [known(piece) for piece in sample["tokens"][:MOST_TOKENS]],
        "in_loss": "".join("01"[bool(counts)] for counts in sample["in_loss"][:MOST_TOKENS]),
        "student": _rounded(sample["student"][:MOST_TOKENS]),
        "teacher": _rounded(sample["teacher"][:MOST_TOKENS]),
        "alternatives": [
            [value for piece, log_prob in likeliest for value in (known(piece), *_rounded([log_prob]))]
            for likeliest in sample["alternatives"][:MOST_TOKENS]
        ],
        "disagreement": None if mean is None else round(mean, 3),
    }


def _places(text: str | None, places: Sequence[int]) -> list[int]:
    """Places in a text as JavaScript counts them in the shown part of it: in 16-bit units."""
    shown = (visible(text[:at]) for at in places if text is not None and at <= MOST_CHARACTERS)
    return [len(before.encode("utf-16-le")) // 2 for before in shown]


def _bounded(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return visible(text[:MOST_CHARACTERS]) + (f"\n\u2026 {more:,} more characters in {NAME}" if more > 0 else "")


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else round(value, 2) for value in values]
