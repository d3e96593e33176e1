"""`--reward.on_error skip`: a reward function that fails now and then, and one that never answers."""

import pytest
from common import ROWS, SDPO, cases

from sdpo_plugin.testing import RunFailed

FLAKY = """
import os, time, torch
from sdpo_plugin.environments import feedback

def once(name):
    try:
        open(os.path.join(os.path.dirname(__file__), name), "x").close()
    except FileExistsError:
        return False
    return True

def reward_func(queries, prompts, labels):
    if labels[0] == "1" and once("one"):
        raise KeyError("the first call for prompt 1")
    if labels[0] == "2":
        raise ValueError("always")
    if labels[0] == "3" and once("hung"):
        time.sleep(3600)
    rewards, logs = torch.ones(len(queries)), {"seen": 2.0, "nothing": None}
    logs["ends"] = float("<eos>" in feedback.special_tokens)
    logs |= {"odd": 3.0} if labels[0] in "13" else {}
    return {"rewards": rewards, "scores": rewards, "feedback": ["as expected"], "extra_logs": logs}
"""


def test_a_skipped_sample_teaches_nothing_and_is_counted(openrlhf, model, tmp_path):
    """Prompt 1 is answered at the second attempt, prompt 2 never, and one call for prompt 3 hangs.

    A micro-batch of prompt 2 has no response token. Some samples log more than others.
    """
    (tmp_path / "reward.py").write_text(FLAKY)
    run = openrlhf(
        model, ROWS, tmp_path / "reward.py", *SDPO, "--distill.weight", "0.5", "--reward.on_error", "skip",
        "--reward.max_attempts", "2", "--reward.timeout", "3", "--reward.max_skipped_fraction", "0.5",
        "--train.micro_batch_size", "1", timeout=90,
    )  # fmt: skip
    assert run.metrics["train/rollout/reward_skipped_fraction"] == [[1, 2 / 16]]
    assert run.metrics["train/reward"] == [[1, 1.0]]  # and not lower for those that have none
    assert run.metrics["train/seen"] == [[1, 2.0]] and run.metrics["train/odd"] == [[1, 3.0]]
    assert run.metrics["train/ends"] == [[1, 1.0]]  # environments know the special tokens of the model
    assert "train/nothing" not in run.metrics
    assert "sample skipped: --reward.remote_url" in run.output and "failed: ValueError: always" in run.output
    skipped = [sample for sample in run.samples[0] if sample.skipped]
    assert [sample.record["label"] for sample in skipped] == ["2", "2"]
    assert all(not sample.action_mask.any() and sample.rewards.item() == 1.0 for sample in skipped)


AGENT = """
import asyncio, sys, time, torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

class Instance(AgentInstanceBase):
    def __init__(self):
        pass

    async def step(self, states, **kwargs):
        if states["label"] == "2":
            raise OSError("the browser is gone")
        if {hangs} and states["label"] == "3":
            await asyncio.sleep(3600)
        if {hangs} and states["label"] == "4":
            time.sleep(3600)
        if {hangs} and states["label"] == "6":
            sys.exit("the browser is closed")
        reward = torch.ones(1)
        return {"rewards": reward, "scores": reward, "environment_feedback": "", "done": states["label"] != "5",
                "sampling_params": states["sampling_params"], "extra_logs": {"feedback": "fine"}}

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Instance)
"""


@pytest.mark.parametrize("on_error", cases(["skip", "stop"], "skip"))
def test_an_agent_that_raises_or_hangs(openrlhf, model, tmp_path, on_error):
    """Prompt 2 raises, 3 waits, 4 blocks, 6 exits; prompt 5 is never done. The engine and all others go on."""
    (tmp_path / "agent.py").write_text(AGENT.replace("{hangs}", str(on_error == "skip")))
    flags = ("--train.agent_func_path", f"{tmp_path}/agent.py", "--reward.on_error", on_error)
    flags += ("--reward.max_skipped_fraction", "0.5", "--reward.timeout", "3", "--reward.max_turns", "2")
    if on_error == "skip":
        run = openrlhf(model, ROWS, "", *SDPO, *flags)
        assert run.metrics["train/rollout/reward_skipped_fraction"] == [[1, 8 / 16]]
        ((_, ended),) = run.metrics["train/rollout/turn_limit_fraction"]
        assert ended in (1 / 8, 2 / 8)  # once, on a busy machine, one of prompt 5's two ended otherwise
        by_label = {sample.record["label"]: sample for sample in run.samples[0]}
        rewards = {label: sample.rewards.item() for label, sample in by_label.items() if sample.skipped is None}
        assert rewards.pop("5") == 2.0 or ended < 2 / 8
        assert rewards == {"0": 1.0, "1": 1.0, "7": 1.0}
        said = {label: by_label[label].skipped.split("the agent failed: ")[1] for label in "2346"}
        assert said["2"] == "OSError: the browser is gone" and said["6"] == "SystemExit: the browser is closed"
        assert said["3"] == "no answer within 3 s (--reward.timeout)"
        assert said["4"].startswith("no answer within 3 s (--reward.timeout); it blocks the event loop of the agents")
        warned = f"--reward.max_turns 2: {round(8 * ended)} of 8 trajectories ended there, not by their agent"
        assert warned in run.output
    else:
        with pytest.raises(RunFailed, match="the agent failed: OSError: the browser is gone") as failed:
            openrlhf(model, ROWS, "", *SDPO, *flags)
        assert failed.value.code == 3
