"""One tiny model and one reward function for all end-to-end runs; the fixture `openrlhf` is the harness itself."""

import os
from pathlib import Path

import pytest
from common import REWARD, ROWS, SDPO, TWO_RANKS

from sdpo_plugin.openrlhf_adapter.platform.cluster import HIDDEN
from sdpo_plugin.testing import Run, tiny_model

# Where the processes of a run find the plugins that tests name in `--plugins`.
os.environ["CUDA_VISIBLE_DEVICES"] = HIDDEN  # the tests stay on the CPU, whatever is there
os.environ["PYTHONPATH"] = str(Path(__file__).parent / "plugins")


def pytest_report_header() -> str:
    return "OpenRLHF runs on the CPU in all tests; GPUs are hidden from them"


def pytest_collection_modifyitems(items) -> None:
    """Autograd counts the devices at the process's first backward pass, be it of a test on the CPU."""
    if any("device" in item.fixturenames for item in items):
        import emulated  # noqa: F401


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "untied")


@pytest.fixture(scope="session")
def reward(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return path


@pytest.fixture(scope="session")
def recorded(openrlhf, model, reward) -> Run:
    """Two steps of SDPO on two ranks with ZeRO-2 and a real engine; other runs replay its samples."""
    return openrlhf(model, ROWS, reward, *SDPO, *TWO_RANKS, "--train.num_episodes", "2", "--ckpt.save_steps", "1")


@pytest.fixture(scope="session")
def replay(openrlhf, model, reward, recorded):
    """`replay(*flags)`: train on the recorded samples of two steps, without an engine; equal runs run once."""
    done: dict[tuple, Run] = {}

    def run(*flags: str, plain: bool = False) -> Run:
        if (flags, plain) not in done:
            done[flags, plain] = openrlhf(model, ROWS, reward, *flags, replay=recorded, plain=plain)
        return done[flags, plain]

    return run


@pytest.fixture(scope="session")
def initial(model) -> dict:
    """The weights every run starts from."""
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.fixture(params=["cpu", "emu"])
def device(request, monkeypatch):
    """Runs the test on the CPU and on the emulated accelerator (`emulated.py`): there every tensor is on it that is
    made without naming a device, and so are those of the test's module. Yields the emulator, or None.
    """
    if request.param == "cpu":
        yield None
        return
    import torch
    from emulated import Emulator
    from torch.utils._pytree import tree_map_only

    with Emulator() as emulator:
        torch.set_default_device("emu")
        try:
            for name, value in vars(request.module).items():
                if isinstance(value, torch.Tensor | list):
                    monkeypatch.setattr(request.module, name, tree_map_only(torch.Tensor, lambda x: x.to("emu"), value))
            emulator.reset()
            yield emulator
        finally:
            torch.set_default_device(None)
