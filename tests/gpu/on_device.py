"""`pytest -p on_device`: every tensor of the tests that says nothing about its device is on the accelerator."""

from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Generator(torch.Generator):
    """Of the device's random numbers."""

    def __new__(cls, device: Any = DEVICE) -> "Generator":
        return super().__new__(cls, device=device)


@pytest.fixture(scope="session")
def model(tmp_path_factory: Any) -> Path:
    """As in tests/conftest.py, which keeps all tests on the CPU."""
    from sdpo_plugin.testing.models import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models"))


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Without those that run OpenRLHF's CPU mode, which a process with a GPU refuses."""
    items[:] = [item for item in items if "rollout_batch" not in item.fixturenames]


torch.set_default_device(DEVICE)
torch.Generator = Generator  # type: ignore[misc]
