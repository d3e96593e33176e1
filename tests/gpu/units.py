"""The unit tests of loss, algorithm and teacher with every tensor on the accelerator."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from machine import row

HERE = Path(__file__).parent
FILES = ("test_loss.py", "test_fused.py", "test_algorithm.py", "test_teacher.py", "test_actor.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    for name in FILES[:1] if tiny else FILES:
        with row("unit tests", file=name) as found, tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "report.xml"
            paths = [str(HERE), str(HERE.parent), str(HERE.parent / "host"), os.environ.get("PYTHONPATH", "")]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "on_device", "-c", os.devnull, "--noconftest",
                 "--import-mode=importlib", f"--rootdir={HERE.parents[1]}", "-p", "no:cacheprovider",
                 f"--junitxml={report}", *(["-k", "clip_bounds"] if tiny else ["-n", "4"]),
                 str(HERE.parent / "units" / name)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
            found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
            found["failed"] = [
                f"{case.get('name')}: {bad[0].get('message', '')}".splitlines()[0][:300]
                for case in suite.iter("testcase")
                if (bad := [*case.iter("failure"), *case.iter("error")])
            ]
            found["ok"] = done.returncode == 0


if __name__ == "__main__":
    main()
