"""The file of samples: what a run, its restart and its readers leave in it and find in it."""

import datetime
import decimal
import json
import resource
import signal

import pytest

from sdpo_plugin.monitoring.sample_file import NAME, SampleFile, read_samples


def lines(*steps, **more):
    return [{"step": step, "sample": 0, **more} for step in steps]


def steps_of(samples):
    return [sample["step"] for sample in samples]


def test_a_restart_drops_what_came_after_its_checkpoint(tmp_path):
    file = SampleFile(tmp_path / "run")
    file.begin(0)
    file.append(lines(1, 1))
    file.append(lines(2))
    with open(file.path, "ab") as killed:
        killed.write(b'{"step": 3, "sam')
    assert steps_of(read_samples(file.path)) == [1, 1, 2]
    again = SampleFile(tmp_path / "run")
    again.begin(1)
    again.append(lines(2, again=True))
    assert [(s["step"], "again" in s) for s in read_samples(file.path)] == [(1, False), (1, False), (2, True)]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    SampleFile(tmp_path / "run").begin(0)
    assert read_samples(file.path) == []


def test_a_run_that_went_on_elsewhere_is_one(tmp_path):
    for directory, steps in (("ppo_1", (1, 2, 3)), ("ppo_2", (3, 4)), ("ppo_3", ())):
        file = SampleFile(tmp_path / directory)
        file.begin(0)
        file.append(lines(*steps, of=directory))
    found = read_samples(tmp_path)
    assert [(s["step"], s["of"]) for s in found] == [(1, "ppo_1"), (2, "ppo_1"), (3, "ppo_2"), (4, "ppo_2")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--diagnostics.log_samples"):
        read_samples(tmp_path / "empty")


def test_any_text_stays_on_its_line_and_is_utf8(tmp_path):
    file = SampleFile(tmp_path)
    file.begin(0)
    text = "a\nb\r\u2028\x85\x1b[31m <script> 你好 \u202e"
    file.append(lines(1, response=text, feedback="half \ud83d"))
    assert len(file.path.read_bytes().splitlines()) == 1
    (sample,) = read_samples(file.path)
    assert sample["response"] == text and sample["feedback"] == "half ?"
    assert "你好".encode() in file.path.read_bytes()


@pytest.mark.parametrize(
    "given, written",
    [
        (datetime.datetime(2024, 5, 1, 10), "2024-05-01T10:00:00"), (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.time(12, 30), "12:30:00"), (datetime.timedelta(seconds=90), "0:01:30"), (b"a", "b'a'"),
        (decimal.Decimal("1.10"), "1.10"), (float("nan"), None), ({1: (2, {3})}, {"1": [2, "{3}"]}),
        ([True, None, 2**70, 0.5, "a"], [True, None, 2**70, 0.5, "a"]),
    ],
)  # fmt: skip
def test_whatever_a_chat_holds_is_written(tmp_path, given, written):
    file = SampleFile(tmp_path)
    file.begin(0)
    file.append(lines(1, prompt=[{"role": "user", "content": "?", "extra": given}]))
    assert read_samples(file.path)[0]["prompt"] == [{"role": "user", "content": "?", "extra": written}]


@pytest.mark.parametrize("line", [b"no json", b"[1]", b'{"sample": 0}', b'{"step": null}', b"\0\0"])
def test_another_broken_line_is_named(tmp_path, line):
    (tmp_path / NAME).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=f"{NAME}, line 2"):
        read_samples(tmp_path)


def test_a_damaged_file_does_not_stop_a_restart(tmp_path, caplog):
    (tmp_path / NAME).write_bytes(b'{"step": 1}\n\0\0\n')
    file = SampleFile(tmp_path)
    file.begin(1)
    file.append(lines(2))
    assert steps_of(read_samples(tmp_path)) == [2]
    assert (tmp_path / "samples.damaged").read_bytes().startswith(b'{"step": 1}') and "line 2" in caplog.text


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A limit on the size of files stands for it: the write ends in the middle of a line."""
    file = SampleFile(tmp_path)
    file.begin(0)
    file.append(lines(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError):
            file.append(lines(2, response="a" * 200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    file.append(lines(3))
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1, 3]
