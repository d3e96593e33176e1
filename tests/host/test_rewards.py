"""`--reward.on_error skip`: a reward function that fails now and then, and one that never answers."""

import pytest
import torch
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
    rewards = torch.ones(len(queries))
    known = float("<eos>" in feedback.special_tokens)
    return {"rewards": rewards, "scores": rewards, "feedback": ["as expected"], "extra_logs": {"ends": known}}
"""


def test_a_skipped_sample_teaches_nothing_and_is_counted(openrlhf, model, tmp_path):
    """Prompt 1 is answered at the second attempt, prompt 2 never, and one call for prompt 3 hangs."""
    (tmp_path / "reward.py").write_text(FLAKY)
    run = openrlhf(
        model, ROWS, tmp_path / "reward.py", *SDPO, "--distill.weight", "0.5", "--reward.on_error", "skip",
        "--reward.attempts", "2", "--reward.timeout", "3", "--reward.max_skipped", "0.5", timeout=90,
    )  # fmt: skip
    assert run.metrics["train/reward_skipped_fraction"] == [[1, 2 / 16]]
    assert run.metrics["train/reward"] == [[1, 1.0]]  # and not lower for those that have none
    assert run.metrics["train/ends"] == [[1, 1.0]]  # environments know the special tokens of the model
    assert "sample skipped: --reward.remote_url" in run.output and "failed: ValueError: always" in run.output
    skipped = [sample for sample in run.samples[0] if sample.skipped]
    assert [sample.record["label"] for sample in skipped] == ["2", "2"]
    assert all(not sample.action_mask.any() and sample.rewards.item() == 1.0 for sample in skipped)


AGENT = """
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

class Instance(AgentInstanceBase):
    def __init__(self):
        pass

    async def step(self, states, **kwargs):
        if states["label"] == "2":
            raise OSError("the browser is gone")
        reward = torch.ones(1)
        return {"rewards": reward, "scores": reward, "environment_feedback": "", "done": True,
                "sampling_params": states["sampling_params"], "extra_logs": {"feedback": "fine"}}

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Instance)
"""


@pytest.mark.parametrize("on_error", cases(["skip", "stop"], "stop"))
def test_an_agent_that_raises(openrlhf, model, tmp_path, on_error):
    (tmp_path / "agent.py").write_text(AGENT)
    flags = ("--train.agent_func_path", f"{tmp_path}/agent.py", "--reward.on_error", on_error)
    flags += ("--reward.max_skipped", "0.5")
    if on_error == "skip":
        run = openrlhf(model, ROWS, "", *SDPO, *flags)
        assert run.metrics["train/reward_skipped_fraction"] == [[1, 2 / 16]]
        assert torch.stack([sample.rewards for sample in run.samples[0]]).eq(1).all()
    else:
        with pytest.raises(RunFailed, match="the agent failed: OSError: the browser is gone") as failed:
            openrlhf(model, ROWS, "", *SDPO, *flags)
        assert failed.value.code == 3
