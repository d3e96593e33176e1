"""An emulated accelerator: tensors of device `emu` compute on the CPU, and mixing them with CPU tensors is an error.

    with Emulator() as emulator:
        y = torch.randn(3, 4, device="emu") @ x.to("emu")
    emulator.waits, emulator.largest, emulator.operations

Built on torch's Python backend for PrivateUse1. As on CUDA, scalars (CPU tensors without a dimension) and CPU indices
may be mixed with the device's tensors, `tensor.data = ...` moves a tensor between devices, and what brings a value to
the CPU is counted: there a GPU's queue runs empty. Streams, pinned memory and collectives are not emulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

backend_registration._setup_privateuseone_for_python_backend("emu")
DEVICE, CPU = torch.device("emu:0"), torch.device("cpu")
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::set_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# What waits for the device on CUDA: a value, or a size that is one, is needed on the CPU.
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
         "aten::unique_dim", "aten::unique_consecutive"}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm"}
VALUES = {"aten::_local_scalar_dense", "aten::equal"}  # return a number


class Emulated(torch.Tensor):
    """`raw` is the CPU tensor with the values; `place` the device on which the tensor pretends to be."""

    raw: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, raw: torch.Tensor, place: torch.device = DEVICE) -> Emulated:
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), dtype=raw.dtype, device=DEVICE, strides=raw.stride(), storage_offset=raw.storage_offset()
        )
        self.raw, self.place = raw, place
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Emulated({self.raw}, {self.place})"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = Emulated(self.raw.clone(), self.place)
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    @property
    def data(self) -> torch.Tensor:
        return Emulated(self.raw, self.place)

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        if new.dtype != self.dtype or new.shape != self.shape:
            raise RuntimeError("the emulated device keeps shape and dtype of a tensor")
        self.raw, self.place = raw(new), place(new)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.place != CPU

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self.place == CPU

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        if self.is_cuda and Emulator.active is not None:
            Emulator.active.waits.append("tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        if self.is_cuda:
            raise TypeError("can't convert a device tensor to numpy")
        return self.raw.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def raw(x: Any) -> Any:
    return x.raw if isinstance(x, Emulated) else x


def place(x: torch.Tensor) -> torch.device:
    return x.place if isinstance(x, Emulated) else x.device


class Emulator(TorchDispatchMode):
    """While active, factories can make tensors of the device.

    Attributes:
        waits: the operations so far that waited for the device.
        operations: number of operations that computed something there; views are none.
        largest: bytes of the largest tensor that was made there.
    """

    active: Emulator | None = None

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.waits: list[str] = []
        self.operations = self.largest = 0

    def __enter__(self) -> Emulator:
        Emulator.active = self
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper's dtype is fixed
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        Emulator.active = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def count(self, func: Any, args: Any, given: list[torch.Tensor], made: list[torch.Tensor], there: bool) -> None:
        name = func.name().split(".")[0]
        at_device = [x for x in given if place(x) == DEVICE]
        if at_device and (name in WAITS or (name in COPIES and not there)):
            self.waits.append(name)
        if name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits.append(name + " by a mask")
        if there and not func.is_view and name != "aten::detach":
            self.operations += 1
            known = {raw(x).untyped_storage().data_ptr() for x in given}
            new = [x.nbytes for x in made if x.untyped_storage().data_ptr() not in known]
            self.largest = max([self.largest, *new])


def run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.name().split(".")[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(place(x) == DEVICE for x in tensors)
    if there and name not in COPIES | INDEXING and any(place(x) == CPU and x.ndim for x in tensors):
        shapes = [(tuple(x.shape), str(place(x))) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device).type == DEVICE.type
    elif name in COPIES - {"aten::_to_copy"}:
        there = place(args[0]) == DEVICE
    args, kwargs = tree_map(raw, (args, dict(kwargs)))
    if device is not None:
        kwargs["device"] = CPU
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    if name in PRODUCTS and func._overloadname == "dtype_out":  # 16-bit factors, float32 sums
        args = tuple(x.to(kwargs["out"].dtype) if isinstance(x, torch.Tensor) else x for x in args[:-1])
        out: Any = func.overloadpacket.out(*args, **kwargs)
    elif name == "aten::_to_copy" and there != any(place(x) == DEVICE for x in tensors):
        kwargs.pop("non_blocking", None)
        out = func(*args, **kwargs)
        out = out.clone() if out is args[0] else out
    else:
        out = func(*args, **kwargs)
    made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    if Emulator.active is not None:
        Emulator.active.count(func, args, tensors, made, there)
    came_in = {id(raw(x)): x for x in tensors}  # operations in place give back what came in

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return came_in.get(id(x)) if id(x) in came_in else Emulated(x) if there else x

    return out if name in VALUES else tree_map(wrapped, out)


# Below the dispatch mode, for what C++ code calls.
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl(
    "empty_strided", lambda size, stride, *, dtype=None, **_: Emulated(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)  # fmt: skip
_kernels.impl(
    "empty.memory_format", lambda size, *, dtype=None, **_: Emulated(torch.empty(size, dtype=dtype)), "PrivateUse1"
)


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    raw(target).copy_(raw(source))
    return target


_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
