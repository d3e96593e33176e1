"""`--ds.enable_sleep`: what plugins hold on the device is in CPU memory while the optimizer is.

OpenRLHF wakes a policy worker for its training alone. The student's own low-precision weights stay awake: engines are
given them, and scores before the update are computed with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sdpo_plugin.config import ConfigError


def reject(args: Any) -> None:
    """Stop where DeepSpeed cannot put its states to sleep, which would come out of every worker as an error."""
    if not args.ds.enable_sleep:
        return
    if args.ds.zero_stage == 0:
        raise ConfigError("--ds.enable_sleep: DeepSpeed can do it from --ds.zero_stage 1 on; give 1, 2 or 3")
    if args.ds.zero_stage == 3 and args.actor.optim != "adam" and not args.ds.adam_offload:
        raise ConfigError(
            f"--ds.enable_sleep: DeepSpeed can do it at --ds.zero_stage 3 with Adam only; give --actor.optim adam in "
            f"place of {args.actor.optim}, or --ds.zero_stage 2"
        )


class Sleeper:
    """Moves tensors between device and CPU memory, in place: references to them stay valid.

    CPU memory is allocated once (pinned, which takes longer than the copies) and kept.

    Attributes:
        kept: the copies in CPU memory, empty until the first sleep.
        asleep: whether `data` of the tensors is in CPU memory.
    """

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []
        self.asleep = False

    @torch.no_grad()
    def sleep(self, tensors: Iterable[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        if not self.kept:
            self.kept = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in self.tensors]
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            kept.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            tensor.data = kept
        torch.cuda.empty_cache()  # else this process keeps the memory reserved while the engines wake
        self.asleep = True

    @torch.no_grad()
    def wake(self) -> None:
        if not self.asleep:
            return
        for tensor in self.tensors:
            tensor.data = tensor.data.to(torch.cuda.current_device(), non_blocking=True, copy=True)
        torch.cuda.synchronize()
        self.asleep = False
