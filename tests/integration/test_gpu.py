"""The sections of tests/gpu that need OpenRLHF: the head of real architectures, and a policy worker in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.check
def test_a_policy_worker_trains_without_ray_or_an_engine(tmp_path):
    """Some twenty seconds: two processes import OpenRLHF. Nothing else runs these sections where there is no GPU."""
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu" / "run.py"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--sections", "models", "policy"], stdout=subprocess.PIPE, text=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout
    heads, policy = ([row for row in rows if row["what"] == what] for what in ("head", "policy"))
    assert len(heads) == 3 and len(policy) == 1
    assert all(row["ok"] for row in heads + policy) and policy[0]["average_error"] < 1e-6
