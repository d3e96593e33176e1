"""The EMA teacher at the size of a model, beside an average in float64 and the two plain ones; and a night's sleep."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from machine import CUDA, DEVICE, milliseconds, milliseconds_of, peak_mib, row, used_mib

from sdpo_plugin.algorithms.teacher import EmaTeacher
from sdpo_plugin.config import TeacherConfig
from sdpo_plugin.interface.models import Fragment

RATE = 0.05
LEARNING_RATE = 1e-6  # Adam moves a weight by about this much a step


class Student:
    """fp32 weights in fragments of equal size, which take Adam's steps."""

    def __init__(self, parameters: int, fragments: int) -> None:
        torch.manual_seed(0)
        self.values = {
            f"weight{i}": 0.02 * torch.randn(parameters // fragments, device=DEVICE) for i in range(fragments)
        }
        self.layout = [[(name, 0, len(values)) for name, values in self.values.items()]]

    def fragments(self) -> dict[str, Fragment]:
        return {name: Fragment(0, values) for name, values in self.values.items()}

    def step(self) -> None:
        for values in self.values.values():
            values.add_(torch.randn_like(values).sign_().add_(0.5), alpha=LEARNING_RATE)


def teacher_of(student: Student, dtype: torch.dtype, offload: bool) -> EmaTeacher:
    where = "cpu" if offload else DEVICE
    weights = {name: values.to(where, dtype, copy=True) for name, values in student.values.items()}
    if offload and CUDA:  # as `worker.offload` keeps them
        weights = {name: values.pin_memory() for name, values in weights.items()}
    model = SimpleNamespace(
        weight_shards=lambda: weights, sync=lambda: None, device_tensors=lambda: list(weights.values())
    )
    worker = SimpleNamespace(master_weights=student, rank=0, ranks=1)
    parts: Any = (model, worker, TeacherConfig(update_rate=RATE, offload=offload))
    return EmaTeacher(*parts)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum((a[n].to(DEVICE).double() - b[n].double()).square().sum().item() for n in b) ** 0.5


def against_float64(parameters: int, fragments: int, dtype: torch.dtype, offload: bool, steps: int) -> None:
    known = {"parameters": parameters, "dtype": str(dtype), "offload": offload, "steps": steps}
    with row("average", **known) as found:
        student = Student(parameters, fragments)
        teacher = teacher_of(student, dtype, offload)
        true = {name: values.double() for name, values in student.values.items()}
        start = {name: values.clone() for name, values in student.values.items()}
        plain = {kind: {n: v.to(kind, copy=True) for n, v in start.items()} for kind in (torch.bfloat16, torch.float32)}
        for _ in range(steps):
            student.step()
            teacher.after_optimizer_step()
            for name, values in student.values.items():
                true[name].lerp_(values.double(), RATE)
                for kind, average in plain.items():
                    average[name].lerp_(values.to(kind), RATE)
        motion = distance(start, true)
        parts: dict[str, list[torch.Tensor]] = {}
        for name, values in teacher.weights():
            parts.setdefault(name, []).append(values)
        averages = {"ours": {n: torch.cat(p) for n, p in parts.items()}}
        averages |= {f"plain {str(kind).removeprefix('torch.')}": average for kind, average in plain.items()}
        found["off"] = {name: distance(average, true) / motion for name, average in averages.items()}
        found["ok"] = found["off"]["ours"] < 1e-5
        true.clear(), start.clear(), plain.clear(), parts.clear(), averages.clear()
        found["ms"] = milliseconds(teacher.after_optimizer_step)
        # Read and written once: weights and remainder; read: the student's.
        found["gb_per_s"] = parameters * (2 * dtype.itemsize + 8 + 4) / found["ms"] / 1e6
        found["peak_mib"] = peak_mib(teacher.after_optimizer_step)


def sleeps(parameters: int, fragments: int) -> None:
    """Teacher's weights and remainder to host memory and back, through `worker.sleep.Sleeper`."""
    from sdpo_plugin.openrlhf_adapter.worker.sleep import Sleeper

    with row("sleep", parameters=parameters) as found:
        student = Student(parameters, fragments)
        teacher = teacher_of(student, torch.bfloat16, offload=False)
        before = [t.clone() for t in teacher.device_tensors()]
        sleeper = Sleeper()
        awake = used_mib()
        first = milliseconds_of(lambda: sleeper.sleep(teacher.device_tensors()))
        asleep = used_mib()
        woken = milliseconds_of(sleeper.wake)
        second = milliseconds_of(lambda: sleeper.sleep(teacher.device_tensors()))
        sleeper.wake()
        same = all(map(torch.equal, before, teacher.device_tensors()))
        found |= {"first_sleep_ms": first, "sleep_ms": second, "wake_ms": woken, "ok": same}
        if awake is not None and asleep is not None:
            found |= {"freed_mib": awake - asleep, "mib": sum(t.nbytes for t in before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    parameters, few = (4_000, 2_000) if tiny else (1_540_000_000, 200_000_000)
    against_float64(parameters, 28, torch.bfloat16, offload=False, steps=20)
    against_float64(few, 4, torch.float32, offload=False, steps=20)
    against_float64(few, 4, torch.bfloat16, offload=True, steps=3)
    if CUDA:
        sleeps(few, 4)


if __name__ == "__main__":
    main()
