"""Every place where OpenRLHF is relied on is declared, and the one that moved is named."""

import ast
import inspect
from pathlib import Path

import pytest

from sdpo_plugin.openrlhf_adapter import patch_points
from sdpo_plugin.openrlhf_adapter.platform import cpu

HOST = Path(patch_points.__file__).parent
# What the host layer binds anew, and modules that it only does that in.
MODULES = {"ppo_actor", "ppo_trainer", "ppo_trainer_async", "vllm_engine"}


@pytest.fixture(scope="module", autouse=True)
def installed():
    cpu.enable()
    import sdpo_plugin.openrlhf_adapter.launcher.install  # noqa: F401


def declared(at: str) -> bool:
    return any(point.at == at for point in patch_points.PATCH_POINTS)


def test_the_installed_openrlhf_fits():
    patch_points.check()
    assert len(patch_points.PATCH_POINTS) > 40


def test_no_override_is_undeclared():
    """A method of ours in the place of one of OpenRLHF's, whatever class it is in."""
    from sdpo_plugin.openrlhf_adapter.controller import controller, rollout
    from sdpo_plugin.openrlhf_adapter.engine import engine
    from sdpo_plugin.openrlhf_adapter.worker import actor, trainer, worker

    seen = 0
    for module in (actor, controller, engine, rollout, trainer, worker):
        for cls in [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]:
            theirs = [c for c in cls.__mro__ if c.__module__.startswith("openrlhf.")]
            for name in [n for n in vars(cls) if callable(vars(cls)[n]) and n != "__init__"]:
                base = next((c for c in theirs if name in vars(c)), None)
                if base is not None:
                    assert declared(f"{base.__module__}:{base.__qualname__}.{name}"), f"{cls.__name__}.{name}"
                    seen += 1
    assert seen > 10


def test_no_name_is_bound_undeclared():
    """`ppo_actor.DataLoader = ...`: what is bound must be there, so it is declared or the class behind it is."""
    bound = set()
    for path in HOST.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else ()
            for target in (name for targets in targets for name in ast.walk(targets)):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    if target.value.id in MODULES:
                        bound.add(f"{target.value.id}:{target.attr}")
    assert "ppo_actor:DataLoader" in bound and "ppo_trainer:PPOTrainer" in bound
    missing = {name for name in bound if not any(point.at.endswith("." + name) for point in patch_points.PATCH_POINTS)}
    assert not missing


def test_what_is_missing_has_a_stand_in_and_is_named(monkeypatch):
    monkeypatch.setattr(patch_points, "PATCH_POINTS", [])

    class Ours(patch_points.patch_point("openrlhf.trainer.ppo_trainer:NoSuchTrainer")):
        @patch_points.overrides("samples")
        def train(self, samples):
            return samples

    assert Ours().train(1) == 1
    with pytest.raises(patch_points.IncompatibleOpenRLHF, match="NoSuchTrainer: not found"):
        patch_points.check()
