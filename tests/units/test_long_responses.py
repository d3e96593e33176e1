"""Nothing is quadratic in the length of a response: four times the tokens are about four times the work."""

import time

import long_responses
import made_run
import pytest
from largest import LargestTensor

SHORT, LONG = 4_096, 16_384
LINEAR, FASTER_THAN_QUADRATIC = 4.4, 9.0  # with what is once; of 16, with what a busy machine adds


class Work(LargestTensor):
    """Bytes of all tensors made while active, and of the largest."""

    all_bytes = 0

    def made(self, sizes):
        super().made(sizes)
        self.all_bytes += sum(sizes)


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def seconds(function, *args) -> float:
    found = []
    for _ in range(2):
        start = time.process_time()
        function(*args)
        found.append(time.process_time() - start)
    return min(found)


def test_loss_gradient_and_teacher_are_linear():
    found = []
    for n in (SHORT, LONG):
        with Work() as work:
            long_responses.worker(n)
        found.append(work)
    short, long = found
    assert long.all_bytes / short.all_bytes < LINEAR and long.bytes / short.bytes < LINEAR


def test_contexts_prompts_and_records_are_linear(tokenizer, tmp_path):
    times = [seconds(long_responses.controller, n, tokenizer, tmp_path / str(n)) for n in (SHORT, LONG)]
    assert times[1] / times[0] < FASTER_THAN_QUADRATIC
    for n in (SHORT, LONG):
        assert (tmp_path / str(n) / "run" / "samples.jsonl").stat().st_size > 100 * n


@pytest.mark.check  # the page has a compiler of charts in it
def test_the_report_is_bounded(tokenizer, tmp_path):
    """It shows the start of a long response."""
    sizes, times = [], []
    for n in (SHORT, LONG):
        long_responses.controller(n, tokenizer, tmp_path / str(n))
        made_run.log(tmp_path / str(n), made_run.curves(3))
        out = tmp_path / f"{n}.html"
        times.append(seconds(long_responses.report, tmp_path / str(n), out))
        sizes.append(out.stat().st_size)
    assert times[1] / times[0] < FASTER_THAN_QUADRATIC and sizes[1] < 2 * sizes[0]
