"""The unit tests of loss, algorithm and teacher with every tensor on the accelerator."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from machine import row, tell

HERE = Path(__file__).parent
FILES = tuple(f"units/test_{name}.py" for name in ("loss", "fused", "algorithm", "teacher")) + ("gpu/interpreted.py",)
# Chunks are of other sizes on a GPU, and the number of rows decides which product kernel, hence the last digits.
OF_A_CPU = "not memory_does_not_grow and not chunk_size_changes_nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    with tempfile.TemporaryDirectory() as directory, row("unit tests", files=FILES[:1] if tiny else FILES) as found:
        report = Path(directory) / "report.xml"
        paths = [str(HERE), str(HERE.parent), str(HERE.parent / "integration"), os.environ.get("PYTHONPATH", "")]
        chosen = ["-k", "clip_bounds"] if tiny else ["-n", "12", "-k", OF_A_CPU]
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "on_device", "-p", "no:cacheprovider", "-c", os.devnull,
            "--noconftest", "--import-mode=importlib", f"--rootdir={HERE.parents[1]}", f"--junitxml={report}", *chosen,
            *(str(HERE.parent / name) for name in found["files"]),
        ]  # fmt: skip
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=sys.stderr, text=True
        )
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        found["ok"] = done.returncode == 0
        for case in suite.iter("testcase"):
            for bad in (*case.iter("failure"), *case.iter("error")):
                said = f"{bad.get('message', '')}".splitlines() or [""]
                tell("failed test", name=case.get("name"), said=said[0][:300])


if __name__ == "__main__":
    main()
