"""A run's TensorBoard events: what was logged at each step, and how far the run was then."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdpo_plugin.config import ConfigError

Curve = list[tuple[int, float]]  # step, value; in the order of steps
STEP_TOTAL = "train/timing/step_total"
GENERATED = "train/rollout/num_samples"


class Logged(NamedTuple):
    wall_time: float  # seconds since 1970
    value: float


@dataclass(frozen=True)
class Run:
    """What a run logged: `curves` by tag, and by step the `generations` so far and the `hours` since it began.

    `generations` is empty where OpenRLHF did not log them. Time between a stop and a restart is not counted.
    """

    name: str
    directory: Path
    curves: dict[str, Curve]
    generations: dict[int, int]
    hours: dict[int, float]

    def matching(self, pattern: str) -> dict[str, Curve]:
        """The curves whose whole tag matches, by what the pattern's first group matched."""
        found = ((re.fullmatch(pattern, tag), curve) for tag, curve in self.curves.items())
        return {match[1]: curve for match, curve in found if match}


def read_scalars(directory: str) -> dict[str, list[list[float]]]:
    """Every scalar logged below `directory`, as `[[step, value], ...]` in the order of steps."""
    return {tag: [list(point) for point in curve] for tag, curve in _merged(_parts(directory)).items()}


def read_run(name: str, directory: str) -> Run:
    """The run whose event files lie below `directory`. Raises ConfigError where there are none."""
    parts = _parts(directory)
    if not parts:
        raise ConfigError(
            f"report: no TensorBoard event files below {directory}; give the directory that the run was given as "
            "--logger.tensorboard_dir"
        )
    curves = _merged(parts)
    steps = sorted({step for curve in curves.values() for step, _ in curve})
    total, generations, generated = 0, {}, dict(curves.get(GENERATED, []))
    for step in steps if generated else []:
        total += int(generated.get(step, 0))
        generations[step] = total
    return Run(name, Path(directory), curves, generations, _hours(parts))


def first_checks(curve: Curve, looks: int) -> float:
    """What the collapse monitor compares a context KL with."""
    return statistics.median(value for _, value in curve[:looks])


def running_median(curve: Curve, looks: int) -> Curve:
    """The median of each value and of the `looks - 1` before it."""
    values = [value for _, value in curve]
    return [(step, statistics.median(values[max(i + 1 - looks, 0) : i + 1])) for i, (step, _) in enumerate(curve)]


def thinned(curve: Curve, most: int) -> Curve:
    """At most `most` of a curve's points: of each stretch the first, least, greatest and last, so no peak is lost."""
    if len(curve) <= most:
        return curve
    stretches = max(most // 4, 1)
    kept: set[int] = set()
    for k in range(stretches):
        at = range(k * len(curve) // stretches, (k + 1) * len(curve) // stretches)
        kept |= {at[0], min(at, key=lambda i: curve[i][1]), max(at, key=lambda i: curve[i][1]), at[-1]}
    return [curve[i] for i in sorted(kept)]


def _hours(parts: Iterable[dict[str, dict[int, Logged]]]) -> dict[int, float]:
    """Hours of training until the end of each step, over the parts of a run that was continued."""
    hours: dict[int, float] = {}
    for part in parts:
        logged: dict[int, float] = {}
        for points in part.values():
            for step, point in points.items():
                logged[step] = min(point.wall_time, logged.get(step, point.wall_time))
        first = min(logged)
        took = part.get(STEP_TOTAL, {}).get(first)
        began = logged[first] - (took.value if took else 0.0)
        hours = {step: spent for step, spent in hours.items() if step < first}
        spent = before = max(hours.values(), default=0.0)
        for step in sorted(logged):
            spent = hours[step] = max(spent, before + (logged[step] - began) / 3600)  # clocks are set back, too
    return hours


def _merged(parts: Iterable[dict[str, dict[int, Logged]]]) -> dict[str, Curve]:
    """By tag; a later part counts from its first step on."""
    merged: dict[str, dict[int, float]] = {}
    for part in parts:
        first = min(step for points in part.values() for step in points)
        merged = {tag: {s: value for s, value in points.items() if s < first} for tag, points in merged.items()}
        for tag, points in part.items():
            merged.setdefault(tag, {}).update({step: point.value for step, point in points.items()})
    return {tag: sorted(points.items()) for tag, points in merged.items() if points}


def _parts(directory: str) -> list[dict[str, dict[int, Logged]]]:
    """The scalars below a directory, by tag and step: of each directory with event files, the oldest first."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    logs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(directory).Reload()
    parts = []
    for name, tags in logs.Runs().items():
        part = {tag: {e.step: Logged(e.wall_time, e.value) for e in logs.Scalars(name, tag)} for tag in tags["scalars"]}
        if part:
            parts.append(part)
    return sorted(parts, key=lambda part: min(p.wall_time for points in part.values() for p in points.values()))
