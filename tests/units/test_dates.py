"""Data sets as OpenRLHF reads them in a run: what a file holds is what templates and reward functions get."""

import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from sdpo_plugin.openrlhf_adapter.platform import cpu


@pytest.fixture
def read(tmp_path, monkeypatch):
    cpu.enable()
    import datasets

    from sdpo_plugin.openrlhf_adapter.launcher import preflight

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


@pytest.mark.parametrize("bad", ["train", "eval"])
def test_labels_of_both_datasets_are_checked_before_a_run(tmp_path, read, monkeypatch, bad):
    from sdpo_plugin import ConfigError, plugins
    from sdpo_plugin.environments import label_check
    from sdpo_plugin.openrlhf_adapter.launcher import preflight

    monkeypatch.setattr(label_check, "DIRECTORY", tmp_path)
    (tmp_path / "mine.py").write_text("def check_label(label):\n    if label < 5: raise ValueError('it is small')")
    for name in ("train", "eval"):
        labels = (7, 3) if name == bad else (7, 8)
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"q": "?", "a": {label}}}\n' for label in labels))
    args = SimpleNamespace(
        algo=SimpleNamespace(name=None), eval=SimpleNamespace(dataset=str(tmp_path / "eval.jsonl"), split="train"),
        data=SimpleNamespace(prompt_dataset=str(tmp_path / "train.jsonl"), prompt_split="train", input_key="q",
                             label_key="a", apply_chat_template=False, input_template=None),
        reward=SimpleNamespace(remote_url=str(tmp_path / "mine.py")), train=SimpleNamespace(agent_func_path=None),
        use_ms=False, plugins=[],
    )  # fmt: skip
    monkeypatch.setattr(plugins, "active", lambda: plugins.load()[0])
    flag = {"train": "--data.prompt_dataset", "eval": "--eval.dataset"}[bad]
    with pytest.raises(ConfigError) as error:
        preflight.data(args)
    assert str(error.value) == (
        f"--data.label_key a: {flag} {tmp_path}/{bad}.jsonl: no response can satisfy the label of 1 of 2 rows "
        "(mine.py): row 1 has 3: it is small; correct these labels, or remove the rows"
    )
