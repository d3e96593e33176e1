"""What this project computes on an accelerator: values, gradients, time, memory; `make gpu`.

    python tests/gpu/run.py [--out runs/gpu] [--sections losses average models policy units]

Each section is a file beside this one, run in a process of its own. `models` and `policy` need OpenRLHF and DeepSpeed,
but no Ray, vLLM or engine; TRL and Liger take part where they are installed. Where there is no CUDA, everything is run
on the CPU at sizes that say nothing about speed. Writes gpu.json and gpu.md, and ends with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMED = ("losses", "average")  # have the machine for themselves
SECTIONS = (*TIMED, "models", "policy", "units")
TIMEOUT = 240.0
ROWS: list[dict[str, Any]] = []
LOCK = threading.Lock()


class Section(threading.Thread):
    """A section's process; its rows are printed and kept as they come, its other output goes to a file."""

    def __init__(self, name: str, out: Path, tiny: bool) -> None:
        super().__init__()
        self.section, self.out = name, out / "gpu.json"
        self.log, self.began = open(out / f"{name}.log", "w"), time.monotonic()
        paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"{name}.py"), *(["--tiny"] if tiny else [])],
            stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip
        self.stop = threading.Timer(TIMEOUT, self.process.kill)
        self.stop.start()
        self.start()

    def run(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"what"'):
                self.add(json.loads(line))
            else:
                self.log.write(line)
        code = self.process.wait()
        self.stop.cancel()
        if code:
            self.add({"what": "section", "error": f"ended with {code}; see {self.section}.log"})
        self.add({"what": "seconds", "seconds": round(time.monotonic() - self.began, 1)})
        self.log.close()

    def add(self, row: dict[str, Any]) -> None:
        row = {"section": self.section, **row}
        with LOCK:
            ROWS.append(row)
            self.out.write_text(json.dumps(ROWS, indent=1))  # as far as it goes, should this process be stopped
        print(" ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value).removeprefix("torch.")


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: of each kind of row a table, whose columns are what its rows have."""
    written = []
    for what in dict.fromkeys((row["section"], row["what"]) for row in rows):
        group = [row for row in rows if (row["section"], row["what"]) == what]
        columns = list(dict.fromkeys(key for row in group for key in row if key not in ("section", "what")))
        written += [f"\n{': '.join(what)}\n", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        written += ["| " + " | ".join(shown(row.get(key, "")) for key in columns) + " |" for row in group]
    return "\n".join(written) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; what happens where there is no CUDA")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tiny = given.tiny or not has_cuda()
    done: list[Section] = []
    for name in (n for n in SECTIONS if n in given.sections):
        done.append(Section(name, given.out, tiny))
        if name in TIMED or tiny:
            done[-1].join()
    for section in done:
        section.join()
    (given.out / "gpu.md").write_text(tables(ROWS))
    wrong = [row for row in ROWS if row.get("error") or row.get("ok") is False]
    print(f"wrote {given.out / 'gpu.json'} and {given.out / 'gpu.md'}; {len(ROWS)} rows, {len(wrong)} of them wrong")
    sys.exit(bool(wrong))


def has_cuda() -> bool:
    """Asked in another process: this one has no use for a CUDA context."""
    asked = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", asked], stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    main()
