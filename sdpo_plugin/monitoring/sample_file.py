"""`samples.jsonl`: the samples that `--diagnostics.log_samples` keeps, one JSON object a line (docs/monitoring.md).

The file lies beside the event files of the run. A run that is stopped at any moment leaves whole lines, and at most one
broken one at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

NAME = "samples.jsonl"
logger = logging.getLogger(__name__)


def read_samples(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of the file `path`, or of all `samples.jsonl` below the directory `path`, in the order of steps.

    A broken last line is left out. A run that was continued in another directory has several files: in the order of
    their directories' names, a later one takes the place of the earlier ones' lines from its first step on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a JSON object with a step; names file and line.
    """
    files = sorted(Path(path).rglob(NAME)) if os.path.isdir(path) else [Path(path)]
    if not files:
        raise FileNotFoundError(f"no {NAME} below {path}; a run writes it with --diagnostics.log_samples N")
    samples: list[dict[str, Any]] = []
    for file in files:
        found = [sample for _, sample in _lines(file)]
        if found:
            first = min(sample["step"] for sample in found)
            samples = [sample for sample in samples if sample["step"] < first] + found
    return samples


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file, as they are and as what they mean."""
    *whole, _ = file.read_bytes().split(b"\n")  # what no line break ends was not written to its end
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            sample = json.loads(line)
            sample["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number}: not a sample ({error!r:.200})") from error
        found.append((line + b"\n", sample))
    return found


class SampleFile:
    """A run's `samples.jsonl`, to write to."""

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / NAME

    def begin(self, step: int) -> None:
        """The run continues after global step `step` (0 for a new run): lines of later steps are removed.

        A damaged file (`read_samples`) is set aside.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[bytes] = []
        if self.path.exists():
            try:
                kept = [line for line, sample in _lines(self.path) if sample["step"] <= step]
            except ValueError as error:
                aside = self.path.with_suffix(".damaged")
                os.replace(self.path, aside)
                logger.warning(f"{error}; the file is now {aside}, and a new one begins")
        beside = self.path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(b"".join(kept))
        os.replace(beside, self.path)

    def append(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add lines. Dates are written in ISO 8601; what else JSON has no form for, as text.

        Raises OSError where there is no room for all of them; then none is added.
        """
        # Environments hand over what they read: half of a surrogate pair has no UTF-8 form.
        encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
        rest = memoryview("".join(encode(_plain(sample)) + "\n" for sample in samples).encode("utf-8", "replace"))
        with open(self.path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise


def _plain(value: Any) -> Any:
    """A value in JSON's types; JSON has no infinity and no nan."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return value.isoformat() if isinstance(value, (date, time)) else str(value)
