"""What runs on a GPU, as far as a CPU can tell: the kernels in Triton's interpreter, and the command of tests/gpu."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.openrlhf_adapter.worker.sleep import Sleeper

GPU = Path(__file__).parents[1] / "gpu"


@pytest.mark.check
def test_kernels_find_what_autograd_finds():
    """Some ten seconds: the interpreter runs a kernel's program for every row. It is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider",
         f"--rootdir={GPU}", str(GPU / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


@pytest.mark.check
def test_the_command_runs_where_there_is_no_gpu(tmp_path):
    """Some seconds: two processes import torch."""
    command = [sys.executable, str(GPU / "run.py"), "--out", str(tmp_path), "--sections", "losses", "average"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert not [row for row in rows if row.get("error") or row.get("ok") is False]
    assert done.returncode == 0, done.stdout
    assert {row["what"] for row in rows} >= {"machine", "value", "time", "average"}
    assert all(row["ok"] for row in rows if row["what"] in ("value", "average"))
    assert "| full JSD |" in (tmp_path / "gpu.md").read_text()


def test_what_sleeps_is_given_back_to_the_device(monkeypatch):
    """Engines wake beside whatever the allocator keeps."""
    seen, tensor = [], torch.ones(3)
    device = tensor.data_ptr()
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        synchronize=lambda: None, empty_cache=lambda: seen.append(tensor.data_ptr()), current_device=lambda: "cpu"
    ))  # fmt: skip
    sleeper = Sleeper()
    sleeper.sleep([tensor])
    assert len(seen) == 1 and seen[0] != device  # nothing is on the device any more when its cache is emptied
    sleeper.wake()
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize("device_bytes, vocab, rows", [
    (80 * 2**30, 151_936, 2048), (24 * 2**30, 151_936, 706), (80 * 2**30, 32_000, 2048), (2**30, 10**6, 16),
])  # fmt: skip
def test_chunks_fill_a_24th_of_a_gpu(device_bytes, vocab, rows):
    from sdpo_plugin.distillation.products import gpu_rows

    assert gpu_rows(device_bytes, 4 * vocab) == rows
    assert rows == 16 or 2.5 * 4 * vocab * rows <= device_bytes / 24


@pytest.mark.parametrize("saves", [False, True])
def test_a_teacher_wakes_at_the_end_only_to_be_saved(monkeypatch, saves):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.worker.teacher_model import SeparateTeacher
    from sdpo_plugin.openrlhf_adapter.worker.worker import PolicyWorker

    seen: list[str] = []
    monkeypatch.setattr(PolicyWorker.__mro__[1], "save_model", lambda _: seen.append("student"))
    worker = PolicyWorker.__new__(PolicyWorker)
    worker.args = SimpleNamespace(ckpt=SimpleNamespace(output_dir="out"))
    worker.actor = SimpleNamespace(model=SimpleNamespace(module=torch.nn.Linear(1, 1)))
    worker.sleeper = SimpleNamespace(wake=lambda: seen.append("awake"))
    worker.strategy, worker.tokenizer = SimpleNamespace(save_model=lambda *_: seen.append("teacher")), None
    actor = SimpleNamespace(hidden_states=None, gathered_head=None)
    teacher = SeparateTeacher(worker, actor)
    worker.hook = SimpleNamespace(openrlhf_save_model=lambda worker, path: teacher.export(path) if saves else None)
    worker.save_model()
    assert seen == (["student", "awake", "teacher"] if saves else ["student"])
