"""Ring attention on the real OpenRLHF: what is logged, recorded and saved; test_gradients.py has the gradient."""

import pytest
from common import LORA, ROWS, SDPO, ZERO
from killer import POINTS

from sdpo_plugin.monitoring.sample_file import read_samples
from sdpo_plugin.testing import RunFailed

RING = (*ZERO[2], "--ds.packing_samples", "--vllm.num_engines", "1", "--ds.ring_attn_size", "2")


@pytest.mark.check
def test_metrics_and_recorded_numbers_are_those_of_one_rank(openrlhf, model, reward, recorded, tmp_path):
    """In float32, whose digits can be compared, in the first step; half of the samples have a teacher context."""
    flags = (*SDPO, "--diagnostics.log_samples", "16", "--no-reprompt.use_feedback", "--plugins", "probe",
             "--probe.fp32", "--distill.weight", "0.5", "--probe.out")  # fmt: skip
    whole = ("--train.micro_batch_size", "16", "--rollout.micro_batch_size", "16")
    one, ring = (
        openrlhf(model, ROWS, reward, *flags, str(tmp_path / f"{len(more)}.pt"), *more, *whole, replay=recorded)
        for more in ((), RING)
    )
    lines, expected = (
        sorted((line for line in read_samples(run.directory / "tensorboard") if line["step"] == 1),
               key=lambda line: line["sample"])
        for run in (ring, one)
    )  # fmt: skip
    assert len(lines) == 16 and {line["active"] for line in lines} == {True, False}
    for line, other in zip(lines, expected, strict=True):
        for name in ("student", "teacher"):
            assert line.pop(name) == pytest.approx(other.pop(name), abs=3e-4)  # rounded to 1e-4
        for mine, theirs in zip(line.pop("alternatives"), other.pop("alternatives"), strict=True):
            assert [x for _, x in mine] == pytest.approx([x for _, x in theirs], abs=3e-4)  # rounded to 1e-4
        assert line == other
    assert ring.metrics.keys() == one.metrics.keys()
    different = {
        name: (values[0][1], ring.metrics[name][0][1]) for name, values in one.metrics.items()
        if ring.metrics[name][0][1] != pytest.approx(values[0][1], rel=1e-3, abs=1e-5)
    }  # fmt: skip
    # The collapse monitor checks a few samples, the first of a micro-batch; one rank without a ring shuffles them.
    others = ("train/timing/", "train/teacher/", "train/self_distillation/student_entropy")
    assert not {name for name in different if not name.startswith(others)}


@pytest.mark.check
def test_an_asynchronous_run_with_a_ring_trains_and_is_recorded(openrlhf, model, reward):
    """Eight samples are recorded in each step, and every token of those with a context has its two numbers."""
    flags = (*SDPO, *RING, *LORA, "--diagnostics.log_samples", "8", "--train.async_enable", "--train.num_episodes", "2")
    run = openrlhf(model, ROWS, reward, *flags)
    lines = read_samples(run.directory / "tensorboard")
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8
    assert all(len(line["student"]) == len(line["teacher"]) == len(line["tokens"]) for line in lines if line["active"])
    losses = [value for _, value in run.metrics["train/self_distillation/loss"]]
    assert len(losses) == 2 and all(value > 0 for value in losses)


@pytest.mark.check
def test_a_killed_run_with_a_ring_continues(openrlhf, model, reward, tmp_path):
    flags = [
        *SDPO, *RING, "--train.num_episodes", "2", "--ckpt.save_steps", "1", "--ckpt.path", str(tmp_path / "ckpt"),
        "--plugins", "sdpo_plugin.testing", "killer",
    ]  # fmt: skip
    with pytest.raises(RunFailed, match="^-9;"):
        openrlhf(model, ROWS, reward, *flags, "--killer.at", POINTS[-1], "--killer.marker", str(tmp_path / "killed"))
    resumed = openrlhf(model, ROWS, reward, *flags, "--ckpt.load_enable")
    assert [step for step, _ in resumed.metrics["train/self_distillation/loss"]] == [2]
