"""Data sets as OpenRLHF reads them in a run: what a file holds is what templates and reward functions get."""

import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from sdpo_plugin.host import cpu


@pytest.fixture
def read(tmp_path, monkeypatch):
    cpu.enable()
    import datasets

    from sdpo_plugin.host import preflight

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(path):
        return list(preflight.load(SimpleNamespace(use_ms=False), "--data.prompt_dataset", str(path), "train"))

    return call


DATED = [
    {"prompt": [{"role": "user", "content": "2024-05-01", "time": "2024-05-01T10:00:00Z"}], "label": "2024-05-01",
     "dates": ["2024-05-01 10:00:00"], "of": {"day": "2024-05-01", "n": 1}},
    {"prompt": [{"role": "user", "content": "2024-05-02", "time": "2024-05-01T10:00:00+02:00"}], "label": None,
     "dates": [], "of": {"day": "2024-05-02", "n": 2}},
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "json", "directory"])
def test_dates_in_json_stay_text(tmp_path, read, form):
    lines = "".join(json.dumps(row) + "\n" for row in DATED)
    if form == "directory":
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / "train.jsonl").write_text(lines)
        assert read(tmp_path / "rows") == DATED
    else:
        path = tmp_path / f"rows.{form}"
        path.write_text(lines if form == "jsonl" else json.dumps(DATED))
        assert read(path) == DATED


def test_dates_that_a_file_has_as_dates_stay_dates(tmp_path, read):
    import datetime

    day = datetime.datetime(2024, 5, 1)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["?"], "label": [day]}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"prompt": "?", "label": day}]


@pytest.mark.parametrize(
    "labels",
    [[1, 2], [0.5, 1.0], [True, False], [[1], [2, 3]], [None, "x"], [[{"f": {"x": [1]}}], [{"g": {"y": [2]}}]]],
)
def test_labels_reach_reward_functions_as_the_file_has_them(tmp_path, read, labels):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "label": label}) + "\n" for label in labels))
    assert [row["label"] for row in read(path)] == labels
