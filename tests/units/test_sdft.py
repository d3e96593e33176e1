"""SDFT on the real host: a demonstrated skill is learned without a reward function, from either prompt."""


import pytest

from sdpo_plugin.algorithms.sdft import SDFT
from sdpo_plugin.config import ConfigError
from sdpo_plugin.testing import fake_worker


def test_a_missing_column_is_named():
    class Rows(dict):
        column_names = ["prompt", "label"]

    args = fake_worker().args
    rows = Rows(prompt=[[{"role": "user", "content": "a"}]])
    with pytest.raises(ConfigError, match="privileged_key privileged_context: the dataset has no such column; it has"):
        SDFT(args).openrlhf_dataset(rows, False, args)
