"""`pytest -p on_device`: every tensor of the tests that says nothing about its device is on the accelerator."""

from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Generator(torch.Generator):
    """Of the device's random numbers."""

    def __new__(cls, device: Any = DEVICE) -> "Generator":
        return super().__new__(cls, device=device)


torch.set_default_device(DEVICE)
torch.Generator = Generator  # type: ignore[misc]
