"""The host's own options beside self-distillation, on the real host: each acts."""

import itertools

import torch
from common import ROWS, SDPO, motion, same

REINFORCE = ("--algo.advantage.estimator", "reinforce")  # needs no group


def values(run, tag) -> list[float]:
    return [value for _, value in run.metrics[f"train/{tag}"]]


def test_epochs_and_minibatches_move_the_teacher_and_the_importance_ratio(replay, openrlhf, model, reward, recorded):
    """Two steps of two epochs of two minibatches; the ratio is 1 where there is one update per rollout."""
    more = ("--train.max_epochs", "2", "--train.batch_size", "8", "--actor.adam.lr", "1e-2")
    run = openrlhf(model, ROWS, reward, *SDPO, *more, "--ckpt.save_steps", "1", replay=recorded)
    teacher = torch.load(run.directory / "ckpt" / "_actor" / "global_step2" / "teacher_rank0.pt", weights_only=False)
    assert teacher["steps"] == 8
    unclipped = ("--distill.is_clip", "none")
    assert not same(run, replay(*SDPO, *more, *unclipped))
    assert same(replay(*SDPO), replay(*SDPO, *unclipped))


def test_kl_to_the_reference_model_holds_the_student_back(replay, initial):
    free = replay(*SDPO, "--actor.adam.lr", "1e-2")
    kl = ("--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.init_coef", "100")
    held = replay(*SDPO, "--actor.adam.lr", "1e-2", *kl)
    assert values(held, "kl")[1] > 0
    assert values(held, "self_distillation/loss")[0] == values(free, "self_distillation/loss")[0]
    assert not same(held, free)
    assert motion(held, initial) < motion(free, initial)


def test_an_entropy_bonus_acts_on_the_student(replay):
    run = replay(*SDPO, "--actor.entropy_coef", "1.0")
    assert values(run, "entropy_loss")[0] > 0 and not same(run, replay(*SDPO))


def test_critic_less_estimators_go_into_the_policy_s_half(replay):
    half = (*SDPO, "--distill.weight", "0.5", "--algo.advantage.estimator")
    runs = [replay(*SDPO), *(replay(*half, estimator) for estimator in ("reinforce", "rloo", "dr_grpo"))]
    assert not any(same(a, b) for a, b in itertools.combinations(runs, 2))


REWARD_OF_TURNS = """
import torch

asked = {}

def reward_func(queries, prompts, labels):
    '''Even labels succeed every other time, odd ones always.'''
    reward = torch.zeros(len(labels))
    for i, label in enumerate(labels):
        asked[label] = asked.get(label, 0) + 1
        reward[i] = float(int(label) % 2 or asked[label] % 2)
    return {"rewards": reward, "scores": reward}
"""


def test_dynamic_filtering_leaves_groups_that_differ(openrlhf, model, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD_OF_TURNS)
    run = openrlhf(
        model, ROWS, tmp_path / "reward.py", *SDPO, "--algo.dynamic_filtering_enable",
        "--algo.dynamic_filtering_range", "0.1", "0.9", "--rollout.batch_size", "2", "--rollout.micro_batch_size", "4",
        "--train.batch_size", "4", "--train.micro_batch_size", "4",
    )  # fmt: skip
    assert sorted(int(sample.labels[0]) for step in run.samples for sample in step) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert values(run, "self_distillation/success_sample_fraction") == [0.5, 0.5]


def test_one_sample_a_prompt_partly_rolled_out_learns_from_feedback(openrlhf, model, reward, initial):
    """Generation goes on while weights change, so samples may be of two policies: their ratio is the engine's."""
    run = openrlhf(
        model, ROWS, reward, *SDPO, *REINFORCE, "--rollout.n_samples_per_prompt", "1", "--train.batch_size", "8",
        "--train.async_enable", "--train.partial_rollout_enable", "--train.num_episodes", "3",
    )  # fmt: skip
    assert values(run, "self_distillation/feedback_used_fraction")[0] == 1.0
    assert all(sample.rollout_log_probs is not None for step in run.samples for sample in step)
    assert motion(run, initial) > 0


AGENT = """
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class Instance(AgentInstanceBase):
    async def step(self, states, **kwargs):
        return {
            "rewards": torch.tensor(1.0), "scores": torch.tensor(1.0), "environment_feedback": "", "done": True,
            "extra_logs": {"feedback": "again"},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Instance)

    async def execute(self, prompt, label, *args, **kwargs):
        response = await super().execute(prompt, label, *args, **kwargs)
        # What there was no room to answer earns a reward all the same: it must not become a demonstration.
        return response if response["action_ranges"] else response | {"reward": 1.0, "scores": 1.0}
"""


def test_samples_without_an_action_teach_nothing_and_are_taught_nothing(openrlhf, model, initial, tmp_path):
    """Where a response may be as long as the context, OpenRLHF lets a longer prompt leave its agent no room."""
    (tmp_path / "agent.py").write_text(AGENT)
    rows = [*ROWS[:-1], {"prompt": [{"role": "user", "content": "say " * 20}], "label": "7", "note": ""}]
    run = openrlhf(
        model, rows, "", *SDPO, "--train.agent_func_path", str(tmp_path / "agent.py"), "--data.max_len", "24",
        "--rollout.max_new_tokens", "24", "--train.micro_batch_size", "2", "--rollout.micro_batch_size", "2",
    )  # fmt: skip
    without = [sample for sample in run.samples[0] if not sample.action_mask.any()]
    assert len(without) == 2 and len(run.samples[0]) == 16
    assert values(run, "self_distillation/reprompt_sample_fraction") == [14 / 16]
    assert values(run, "self_distillation/success_group_fraction") == [7 / 8]
    assert values(run, "self_distillation/token_fraction") == [1.0]
    assert motion(run, initial) > 0
