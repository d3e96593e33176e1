"""Labels that no response can satisfy end a run before it starts, whatever reading them does."""

import datetime
import time
from types import SimpleNamespace

import pytest

from sdpo_plugin import ConfigError
from sdpo_plugin.environments import label_check
from sdpo_plugin.environments.feedback import reward_function
from sdpo_plugin.openrlhf_adapter.launcher import labels as host

MINE = """
import time

def check_label(label):
    if label == "never":
        9 ** 9 ** 9  # holds the interpreter lock
    if label == "dies":
        import os
        os.abort()
    if label == "memory":
        bytearray(10 ** 12)
    if label == "library":
        import no_such_library
    if not isinstance(label, int):
        raise ValueError(f"it is no number ({type(label).__name__})")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """An environment of this package, as far as the check knows."""
    monkeypatch.setattr(label_check, "DIRECTORY", tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def check(labels, url, label_key="label", agent=None):
    args = SimpleNamespace(
        reward=SimpleNamespace(remote_url=url), train=SimpleNamespace(agent_func_path=agent),
        data=SimpleNamespace(label_key=label_key),
    )  # fmt: skip
    host.check(args, "--data.prompt_dataset rows.jsonl", SimpleRows(labels))


class SimpleRows(list):
    def __getitem__(self, key):
        assert key == "label"
        return iter(self)


def test_the_first_labels_that_cannot_be_satisfied_are_named(mine):
    check([1, 2, True], str(mine))
    with pytest.raises(ConfigError) as error:
        check([1, "one", 2, "two", None, ["x" * 200], 3], str(mine))
    assert str(error.value) == (
        "--data.label_key label: --data.prompt_dataset rows.jsonl: no response can satisfy the label of 4 of 7 rows "
        "(mine.py): row 1 has 'one': it is no number (str); row 3 has 'two': it is no number (str); row 4 has None: it "
        "is no number (NoneType); correct these labels, or remove the rows"
    )
    with pytest.raises(ConfigError, match=r"of 1 of 1 rows \(mine.py\): row 0 has \['x{78}\.\.\.: it is no number"):
        check([["x" * 200]], str(mine))


def test_a_label_that_is_not_given_is_the_flag_s_matter(mine):
    with pytest.raises(ConfigError, match="mine.py needs labels; give --data.label_key with the column"):
        check([1], str(mine), label_key=None)


def test_a_hostile_label_is_killed_and_the_others_are_read(mine, monkeypatch):
    """Two seconds are the time limit of a label, here."""
    monkeypatch.setattr(label_check, "SECONDS", 1.0)
    monkeypatch.setattr(label_check, "START", 30.0)
    found = label_check.faults(mine, [1, "never", 2, "dies", 3, "memory", 4, "x"], lambda done: None)
    assert (found.rows, found.number) == (8, 4)
    assert [(row, label, reason.partition(":")[0]) for row, label, reason in found.first] == [
        (1, "never", "it takes more than 1 s to read"),
        (3, "dies", "reading it ended the process (exit code -6)"),
        (5, "memory", "MemoryError"),
    ]


def test_a_long_dataset_is_checked_as_far_as_there_is_time(mine, monkeypatch, capsys):
    clock = iter(range(10**6))
    monkeypatch.setattr(label_check, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    check(list(range(1000)), str(mine))
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("rows.jsonl: 10 of 1000 labels checked by mine.py") and len(said) > 5
    assert said[-1].endswith("rows.jsonl: 120 of 1000 labels were checked in 120 s; the rest are not checked")


def test_the_same_text_is_read_once(mine):
    began = time.monotonic()
    labels = ["x"] * 10**5
    found = label_check.faults(mine, labels, lambda done: None)
    assert found.number == 10**5 and time.monotonic() - began < 30


def test_a_library_that_is_missing_is_no_label_s_fault(mine):
    with pytest.raises(ConfigError, match=r"--reward.remote_url .*mine.py: cannot run on this machine \(No module"):
        check(["library"], str(mine))


def test_what_is_not_ours_is_not_run(mine, tmp_path):
    (mine.parent / "plain.py").write_text("raise SystemExit")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mine.py").write_text("raise SystemExit")
    for url in (None, "", str(tmp_path / "theirs" / "mine.py"), str(mine.parent / "plain.py"), str(tmp_path / "no.py")):
        check(["one"], url)
    check(["one"], str(mine), agent="agent.py")
    assert label_check.environment("sdpo_plugin/environments/../environments/maths.py") is None  # in another directory


@pytest.mark.parametrize(
    "label, text",
    [
        (datetime.datetime(2024, 5, 1), "2024-05-01"), (datetime.datetime(2024, 5, 1, 10), "2024-05-01T10:00:00"),
        (datetime.date(2024, 5, 1), "2024-05-01"), (datetime.time(10, 30), "10:30:00"), ("2024-05-01", "2024-05-01"),
        (datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc), "2024-05-01T00:00:00+00:00"), (5, 5),
        (None, None), ({"a": [datetime.date(2024, 5, 1)]}, {"a": ["2024-05-01"]}),
    ],
)  # fmt: skip
def test_an_environment_s_labels_have_their_dates_as_text(label, text, tmp_path, monkeypatch):
    def judge(response, label):
        return float(label == text and type(label) is type(text)), None

    assert reward_function(judge, 100)(["Q1"], ["Q"], [label])["rewards"].item() == 1.0
    (tmp_path / "mine.py").write_text(f"def check_label(label):\n    if label != {text!r}: raise ValueError(label)")
    assert label_check.faults(tmp_path / "mine.py", [label], print).first == []


@pytest.mark.parametrize("label", [datetime.datetime(2024, 5, 1), b"x", {1, 2}, {"a": datetime.date(2024, 5, 1)}])
def test_a_reward_server_is_sent_json(label):
    check([1, "x", None, [1], {"a": 2}], "http://h/judge")
    check([label], "reward.py")
    with pytest.raises(ConfigError, match=r"_key label: .* row 1 has .*, a (datetime|bytes|set|dict), which cannot"):
        check([1, label], "http://h/judge")
    check([1, label], "http://h/judge", label_key=None)
