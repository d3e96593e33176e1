"""Data sets as OpenRLHF reads them, but that dates in JSON files stay the texts they are.

Where every value of a column, or of a key in its chats, looks like an ISO date, `datasets` makes datetimes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import datasets
from openrlhf.datasets import utils

from sdpo_plugin.openrlhf_adapter.patch_points import patch_point

Loader = Callable[..., Any]


def with_dates_as_text(load: Loader) -> Loader:
    """`datasets.load_dataset`, which reads JSON once more where it found dates."""

    @functools.wraps(load)  # and with its signature, which is a seam's
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        one = next(iter(found.values())) if isinstance(found, dict) else found
        if one.info.builder_name != "json" or (features := _as_text(one.features)) == one.features:
            return found
        return load(*args, **kwargs, features=datasets.Features(features))

    return load_dataset


def _as_text(feature: Any) -> Any:
    """A feature, or several by name, with JSON, which is kept as it is, in the place of timestamps."""
    if isinstance(feature, dict):
        return {name: _as_text(part) for name, part in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_as_text(feature.feature))
    dated = isinstance(feature, datasets.Value) and feature.dtype.startswith("timestamp")
    return datasets.Json() if dated else feature


_load_dataset = with_dates_as_text(patch_point("openrlhf.datasets.utils:load_dataset", "path", "features"))


def bind() -> None:
    """Let OpenRLHF in this process read data sets so."""
    utils.load_dataset = _load_dataset
