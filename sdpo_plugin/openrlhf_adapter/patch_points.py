"""What of OpenRLHF is relied on: declared where it is, and checked before a run.

Nothing of OpenRLHF is copied. Its classes are subclassed, its functions wrapped, and the names under which it looks
them up are bound to ours. Each of these places is a patch point: `patch point` looks it up, `overrides` marks a method.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])
TESTED = ("0.11.2",)
FLAGS = (  # that earlier versions do not have
    "actor.loss_agg_mode", "algo.advantage.is_correction_gating", "algo.advantage.is_correction_level",
    "algo.advantage.is_correction_mode",
)  # fmt: skip


class IncompatibleOpenRLHF(RuntimeError):
    """The installed OpenRLHF does not have the shape this adapter attaches to."""


@dataclass(frozen=True)
class PatchPoint:
    """One attribute of OpenRLHF.

    Attributes:
        at: `package.module:attribute.path` (remote classes are looked through).
        parameters: those we pass or receive; more may exist.
    """

    at: str
    parameters: tuple[str, ...] = ()

    def find(self) -> Any:
        """Raises ImportError or AttributeError where there is nothing."""
        module, path = self.at.split(":")
        found = pkgutil.resolve_name(module)
        for part in path.split("."):
            found = plain_class(getattr(found, part))
        return found

    def problem(self) -> str | None:
        try:
            found = self.find()
        except (ImportError, AttributeError) as error:
            return f"not found ({error})"
        if self.parameters:
            has = inspect.signature(found).parameters
            missing = [p for p in self.parameters if p not in has]
            if missing:
                return f"takes ({', '.join(has)}), expected also ({', '.join(missing)})"
        return None


PATCH_POINTS: list[PatchPoint] = []  # of every module of this folder that was imported


def plain_class(cls: Any) -> Any:
    """The class inside a `@ray.remote` class; anything else unchanged."""
    metadata = getattr(cls, "__ray_metadata__", None)
    return metadata.modified_class.__ray_actor_class__ if metadata is not None else cls


class Missing:
    """Stands where OpenRLHF has nothing, so that `check` can name all of it."""


def patch_point(at: str, *parameters: str) -> Any:
    """The class or function of OpenRLHF `at` this place, which takes `parameters` among others."""
    declared = PatchPoint(at, parameters)
    PATCH_POINTS.append(declared)
    try:
        return declared.find()
    except (ImportError, AttributeError):
        return Missing


class overrides:  # noqa: N801
    """`@overrides("parameter", ...)`: a method in the place of the base class's, which takes these parameters.

    `of`: the class whose method it is, in a mix-in for several.
    """

    def __init__(self, *parameters: str, of: type | None = None) -> None:
        self.parameters, self.of = parameters, of

    def __call__(self, method: Method) -> Method:
        self.method = method
        return cast(Method, self)  # until `__set_name__`

    def __set_name__(self, owner: type, name: str) -> None:
        setattr(owner, name, self.method)
        theirs = self.of or next((c for c in owner.__mro__[1:] if name in vars(c)), owner.__mro__[1])
        PATCH_POINTS.append(PatchPoint(f"{theirs.__module__}:{theirs.__qualname__}.{name}", self.parameters))


def check(patch_points: list[PatchPoint] | None = None) -> None:
    """Compare the installed OpenRLHF with what is relied on.

    Raises:
        IncompatibleOpenRLHF: names every patch point that does not fit, OpenRLHF's version and the tested versions.
    """
    problems = [f"  {point.at}: {problem}" for point in patch_points or PATCH_POINTS if (problem := point.problem())]
    if problems:
        raise IncompatibleOpenRLHF(cannot_be_extended("\n".join(problems)))


def check_flags(known: Collection[str]) -> None:
    """Raises IncompatibleOpenRLHF unless the flags of OpenRLHF's launcher, by dotted name, have those relied on."""
    if missing := [f"  --{flag}: no such flag" for flag in FLAGS if flag not in known]:
        raise IncompatibleOpenRLHF(cannot_be_extended("\n".join(missing)))


def cannot_be_extended(problems: str) -> str:
    tested = ", ".join(TESTED)
    installed = f"openrlhf {version('openrlhf')} cannot be extended; tested with {tested}"
    return f"{installed}. Patch points that changed:\n{problems}"
