"""Feedback on one turn: whose it is, what the teacher reads for which turn, and which tokens are in the loss."""

import asyncio
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from three_samples import ACTION, ATTENTION, SEQUENCES

from sdpo_plugin.algorithms.rlcsd import RLCSD, RlcsdConfig
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.algorithms.srpo import SRPO, SrpoConfig
from sdpo_plugin.config import DistillConfig, RepromptConfig, RewardConfig
from sdpo_plugin.distillation.context import Rollout, build_teacher_contexts, context_metrics
from sdpo_plugin.distillation.loss import per_token_loss
from sdpo_plugin.interface.rollout_batch import RolloutBatch, Turn
from sdpo_plugin.interface.scoring import ScoringRequest, teacher_inputs
from sdpo_plugin.openrlhf_adapter.platform import cpu
from sdpo_plugin.testing import fake_worker

PLAIN = RepromptConfig(template="{prompt}{solution}{feedback}", solution_template="[{successful_previous_attempt}]",
                       feedback_template="({feedback_raw})")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    cpu.enable()


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


# ── what an agent says ──


class Agent:
    """Says of step n what `says[n]` has, after letting others run."""

    def __init__(self, says):
        self.says, self.n = says, 0

    async def step(self, states):
        await asyncio.sleep(0)
        self.n += 1
        return {"rewards": torch.tensor(0.0), "environment_feedback": "", "done": self.n == len(self.says),
                "extra_logs": self.says[self.n - 1]}  # fmt: skip


def trajectories(*agents):
    """`extra_logs` of trajectories that are played at once, by an executor that keeps the last step's, as OpenRLHF."""
    from sdpo_plugin.openrlhf_adapter.engine.agents import hosted, played
    from sdpo_plugin.openrlhf_adapter.engine.calls import reward_config

    async def execute(agent, says, **given):
        one, done = agent(says), False
        while not done:
            result = await one.step({})
            done = result["done"]
        return {"extra_logs": result["extra_logs"]}

    async def play():
        agent = hosted(Agent)
        reward_config.set(RewardConfig())
        played_at_once = [
            played(execute)(agent=agent, says=says, max_length=64, sampling_params=None, hf_tokenizer=None)
            for says in agents
        ]
        return await asyncio.gather(*played_at_once)

    responses = asyncio.run(play())
    assert [response["extra_logs"].pop("trajectory_limit") for response in responses] == [""] * len(agents)
    return [response["extra_logs"] for response in responses]


def test_what_steps_say_is_collected_for_each_trajectory():
    first, second, silent = trajectories(
        [{"feedback": "a", "turn_feedback": "x"}, None, {"feedback": "b", "steps": 3}],
        [{}, {"feedback": None, "turn_feedback": "y"}, {"feedback": " ", "turn_feedback": "z"}], [None],
    )  # fmt: skip
    assert first == {"feedback": "a\n\nb", "turn_feedback": ["x", None, None], "steps": 3}
    assert second == {"feedback": None, "turn_feedback": [None, "y", "z"]}
    assert silent == {"feedback": None, "turn_feedback": [None]}


def test_what_is_no_text_is_left_for_the_message_that_names_it():
    (said,) = trajectories([{"feedback": "a", "turn_feedback": 3}, {"feedback": ["b"]}])
    assert said == {"feedback": ["b"], "turn_feedback": [3, None]}
    with pytest.raises(TypeError, match="feedback on turn 0 of a rollout of group 0 is int, not text.*pass a str"):
        build_teacher_contexts([Rollout(0, "Q", "A", 0.0, turn_feedback=said["turn_feedback"])], PLAIN)


def test_an_executor_s_own_extra_logs_win():
    from sdpo_plugin.openrlhf_adapter.engine.agents import Step, _trajectory, played

    async def execute(**given):
        _trajectory.get().steps.append(Step("of a step", "of a turn", ""))
        return {"extra_logs": {"feedback": "of the executor"}}

    said = asyncio.run(played(execute)(max_length=64, sampling_params=None, hf_tokenizer=None))["extra_logs"]
    assert said == {"feedback": "of the executor", "turn_feedback": ["of a turn"], "trajectory_limit": ""}


def test_a_turn_s_tokens_are_known_from_the_actions_that_the_engine_sampled():
    """Empty observations and empty actions between; what OpenRLHF cut off is of no turn."""
    from sdpo_plugin.openrlhf_adapter.controller.rollout import turns_of

    ranges = [(3, 5), (5, 7), (9, 9), (10, 14), (20, 22)]  # the sequence was cut after 12 tokens
    turns = turns_of(ranges, 11, ["a", None, "c", "d", "e"])
    assert turns == [Turn(2, 4, "a"), Turn(4, 6), Turn(8, 8, "c"), Turn(9, 11, "d"), Turn(11, 11, "e")]
    assert turns_of([(2, 4)], 3, None) == [Turn(1, 3)] and turns_of([], 3, None) == []
    for wrong in (["a"], "abcde"):
        with pytest.raises(TypeError, match=r"a response of 5 turns is .*for each of its action_ranges"):
            turns_of(ranges, 11, wrong)


@pytest.mark.parametrize(
    ("commands", "told", "reward"),
    [
        (["find tea", "take 2 C", " close\n"], {}, 1.0),
        (["get tea", "find salt", "take 1 B", "take 3 C", "close"],
         {0: "The commands are find ITEM", 1: "no salt here, only tea, rope", 2: "no shelf B", 3: "2 were"}, 0.0),
        (["close"], {0: "Still to be taken: 2 tea."}, 0.0),
        (["find tea"] * 8, {}, 0.0),
    ],
)  # fmt: skip
def test_the_recipe_s_storeroom_says_of_each_command_what_was_wrong(tokenizer, commands, told, reward):
    recipe = Path(__file__).parents[2] / "recipes" / "multi_turn" / "agent.py"
    spec = importlib.util.spec_from_file_location("agent", recipe)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    module.Agent.between = module.between(tokenizer)
    agent = module.Agent()

    async def play():
        await agent.reset({"label": json.dumps({"order": {"tea": 2}, "shelves": {"tea": "C", "rope": "D"}})})
        return [await agent.step({"action_text": command}) for command in commands]

    steps = asyncio.run(play())
    assert [step["done"] for step in steps] == [False] * (len(commands) - 1) + [True]
    assert sum(step["rewards"].item() for step in steps) == reward
    said = {turn: step["extra_logs"]["turn_feedback"] for turn, step in enumerate(steps)}
    assert {turn for turn in said if said[turn]} == told.keys() and all(told[turn] in said[turn] for turn in told)
    assert [bool(step["extra_logs"]["feedback"]) for step in steps[:-1]] == [False] * (len(commands) - 1)
    if len(steps) > 1:
        answer = "Error." if 0 in told else "Shelf C."
        assert steps[0]["environment_feedback"] == f"<|user|>{answer}<|assistant|>"


# ── what the teacher is shown ──


def shown(feedback, *turns, solution=None, config=PLAIN):
    """What is read for each turn, and the context."""
    group = [Rollout(0, "Q", "A", 0.0, feedback, turn_feedback=turns)]
    group += [Rollout(0, "Q", solution, 1.0)] if solution else []
    context = build_teacher_contexts(group, config)[0]
    own = [context.of_turn(turn) for turn in range(len(turns))]
    return [one and one.messages for one in own], context


def test_a_turn_s_feedback_is_shown_for_that_turn_beside_the_trajectory_s():
    assert shown("f", None, "x", "y", "x")[0] == ["Q(f)", "Q(f\n\nx)", "Q(f\n\ny)", "Q(f\n\nx)"]
    read, context = shown(None, None, "x", " ")
    assert read == [None, "Q(x)", None]  # other turns are shown nothing
    assert context.active and context.messages == "Q" and not context.sections
    assert shown("f", None, None)[1].by_turn == {} and not shown(None, None, None)[1].active
    context = shown("f", "x", "y", "x")[1]
    assert context.of_turn(0) is context.of_turn(2)  # and is read once


def test_a_solution_does_not_replace_a_turn_s_feedback():
    """It does replace the trajectory's: it shows the way, but not from where this turn stood."""
    assert shown("f", None, "x", solution="S")[0] == ["Q[S]", "Q[S](x)"]
    both = RepromptConfig(**{**vars(PLAIN), "feedback_only_without_solution": False})
    assert shown("f", None, "x", solution="S", config=both)[0] == ["Q[S](f)", "Q[S](f\n\nx)"]


def test_feedback_that_is_not_used_is_not_shown_for_a_turn_either():
    for change in ({"use_feedback": False}, {"template": "{prompt}{solution}"}):
        read, context = shown("f", "x", solution="S", config=RepromptConfig(**{**vars(PLAIN), **change}))
        assert read == ["Q[S]"] and not context.by_turn


def test_metrics_count_feedback_on_turns():
    rollouts = [Rollout(0, "Q", "A", 0.0, turn_feedback=[None, "x"]), Rollout(0, "Q", "A", 0.0, turn_feedback=[None])]
    metrics = context_metrics(rollouts, build_teacher_contexts(rollouts, PLAIN), PLAIN)
    names = ("feedback_available", "feedback_used", "reprompt_sample")
    assert [metrics[f"self_distillation/{name}_fraction"] for name in names] == [0.5] * 3


# ── what is attached to the sample ──


@pytest.fixture
def attached(tokenizer):
    """`attached([(action, observation, turn feedback), ...], feedback)`: of one trajectory behind the prompt `Q`.

    Returns the text of the tokens in the loss, by prompt the text that is scored behind it, what else, and metrics.
    """

    def attach(trajectory, feedback=None, positions=math.inf, algorithm=SDPO, **options):
        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        tokens, ranges = ids("Q"), []
        for action, observation, _ in trajectory:
            ranges.append((len(tokens), len(tokens) + len(action)))
            tokens += ids(action + observation)
        mask = torch.zeros(1, len(tokens) - 1, dtype=torch.long)
        for start, stop in ranges:
            mask[0, start - 1 : stop - 1] = 1
        turns = [Turn(s - 1, e - 1, told) for (s, e), (_, _, told) in zip(ranges, trajectory, strict=True)]
        sample = SimpleNamespace(
            sequences=torch.tensor([tokens]), action_mask=mask, truncated=torch.tensor([False]), feedback=feedback,
            record={"prompt": "Q"}, turns=turns,
        )  # fmt: skip
        experience = SimpleNamespace(index=[0], rewards=torch.tensor([0.0]), info={})
        groups = {"reprompt": vars(PLAIN), **options, "data": {"apply_chat_template": False, "input_template": None,
                  "input_key": "prompt", "chat_template_kwargs": "{}"}}  # fmt: skip
        args = fake_worker(**groups).args
        batch = RolloutBatch([sample], [experience], args, tokenizer, positions)
        algorithm(args).openrlhf_rollout_batch(batch)
        data = {name.removeprefix("plugin/"): values[0] for name, values in experience.info.items()}
        prompts, predicted = data["teacher_prompt"], sample.sequences[0, 1:]
        spans = data.get("teacher_spans", torch.tensor([[0, len(prompts)]]).expand(len(predicted), 2))
        reads = {
            tokenizer.decode(prompts[begin:end]): tokenizer.decode(predicted[spans[:, 1].eq(end) & mask[0].bool()])
            for begin, end in spans.unique(dim=0).tolist() if end
        }  # fmt: skip
        return tokenizer.decode(predicted[data["loss_mask"]]), reads, data, batch.metrics

    return attach


ONE, TWO, THREE = ("aa", "1", "x"), ("bbb", "2", None), ("c", "", "y")


def test_each_turn_is_scored_after_its_own_prompt(attached):
    loss, reads, data, _ = attached([ONE, TWO, THREE], feedback="f")
    assert reads == {"Q(f\n\nx)": "aa", "Q(f)": "bbb", "Q(f\n\ny)": "c"} and loss == "aabbbc"
    loss, reads, *_ = attached([ONE, TWO, THREE])
    assert reads == {"Q(x)": "aa", "Q(y)": "c"} and loss == "aac"  # nothing is known about the second turn
    loss, reads, *_ = attached([ONE, TWO, ("dd", "3", "x")], feedback="f")
    assert reads == {"Q(f\n\nx)": "aadd", "Q(f)": "bbb"}


def test_without_feedback_on_turns_nothing_is_added(attached):
    silent = [(action, observation, None) for action, observation, _ in (ONE, TWO, THREE)]
    loss, reads, data, _ = attached(silent, feedback="f")
    assert reads == {"Q(f)": "aabbbc"} and loss == "aabbbc" and "teacher_spans" not in data
    loss, reads, data, _ = attached(silent)
    assert reads == {} and loss == "" and "teacher_spans" not in data


def test_turns_without_a_token_and_turns_without_an_observation_between(attached):
    """The response mask alone would take the first two for one turn, and miss the empty one."""
    loss, reads, *_ = attached([("aa", "", "x"), ("bb", "1", "y"), ("", "2", "z"), ("d", "", "u")])
    assert reads == {"Q(x)": "aa", "Q(y)": "bb", "Q(u)": "d"} and loss == "aabbd"
    assert attached([("", "1", "x"), ("b", "", None)])[:2] == ("", {})


def test_a_scoring_request_needs_room_for_its_own_turn_only(attached):
    """Of 20 positions the trajectory leaves 5, 10 or 16 to a prompt; what is shown is cut to that, down to nothing."""
    trajectory = [("aaaa", "1", "x" * 7), ("bbbbb", "2", "y" * 7), ("cccc", "", "z" * 7)]
    loss, reads, _, metrics = attached(trajectory, positions=20)
    assert reads == {"Q(xxxxxxx)": "aaaa", "Q(yyyyyyy)": "bbbbb", "Q(zz)": "cccc"} and loss == "aaaabbbbbcccc"
    assert metrics["self_distillation/truncated_fraction"] == 1.0
    loss, reads, _, metrics = attached(trajectory, positions=15)
    assert reads == {"Q(xxxxxxx)": "aaaa", "Q(yy)": "bbbbb"} and loss == "aaaabbbbb"
    assert metrics["self_distillation/too_long_fraction"] == 1.0


def test_skipped_tokens_leave_the_loss_and_their_turn_unread(attached):
    loss, reads, *_ = attached([ONE, TWO, THREE], feedback="f", distill={"skip_tokens": 3})
    assert loss == "bbc" and reads == {"Q(f)": "bbb", "Q(f\n\ny)": "c"}


def test_no_variant_puts_a_turn_into_the_loss_that_its_teacher_does_not_read(attached):
    loss, reads, data, _ = attached([ONE, TWO, THREE], algorithm=SRPO, srpo=vars(SrpoConfig()))
    assert loss == "aac" and reads == {"Q(x)": "aa", "Q(y)": "c"}
    loss, reads, *_ = attached([TWO], algorithm=SRPO, srpo=vars(SrpoConfig()))
    assert loss == "bbb" and reads == {}  # of a sample without a teacher all tokens count, for the policy loss
    loss, reads, data, _ = attached([ONE, TWO], algorithm=RLCSD, rlcsd=vars(RlcsdConfig()))
    assert loss == "" and len(data["teacher_prompt"]) == len(data["teacher_prompt/1"]) == 0  # no wrong hint


# ── what the teacher reads ──

# Of the second sample (tokens 3, 4, 5 | 21, 22, 9, 9, 23) the first turn is behind one prompt and the second behind
# another; the first sample's is behind one.
PROMPTS = [torch.tensor([7, 7]), torch.tensor([8, 5, 6, 6, 6]), torch.tensor([], dtype=torch.long)]
SPANS = [torch.tensor([[0, 0], [0, 2], [0, 2], [0, 2]]),
         torch.tensor([[0, 0], [0, 0], [0, 2], [0, 2], [0, 0], [0, 0], [2, 5]]), torch.zeros(2, 2, dtype=torch.long)]
MASKS = [spans[:, 1] > 0 for spans in SPANS]


def test_a_scoring_request_ends_with_the_last_token_that_it_scores():
    first = torch.tensor([0, 0, 1, 1, 0, 0, 0]).bool()
    second = ACTION[1].bool() & ~first
    reads = [ScoringRequest(1, torch.tensor([8, 5]), first), ScoringRequest(1, torch.tensor([6, 6, 6]), second)]
    sequences, attention, rows, scored = teacher_inputs(SEQUENCES, ACTION, reads)
    assert sequences.tolist() == [[8, 5, 21, 22, 0, 0, 0, 0], [6, 6, 6, 21, 22, 9, 9, 23]]
    assert attention.sum(dim=1).tolist() == [4, 8]
    assert torch.roll(sequences, -1, 1)[rows].tolist() == [21, 22, 23]
    assert torch.stack(scored, dim=1).tolist() == [[1, 2], [1, 3], [1, 6]]


@pytest.mark.parametrize("first_sample_s_mask", [MASKS[0], torch.zeros(4, dtype=torch.bool)])
def test_every_token_s_loss_is_against_its_own_read(first_sample_s_mask):
    options = {"mode": "full", "alpha": 0.5}
    worker = fake_worker(distill={**options, "loss_agg_mode": "token-mean"})
    plugin = SDPO(worker.args)
    plugin.openrlhf_worker_setup(worker)
    masks = [first_sample_s_mask, *MASKS[1:]]
    failed = [torch.tensor(True)] * 3  # so that the context's effect is watched
    got = worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=PROMPTS, teacher_spans=SPANS,
                             loss_mask=masks, failed=failed)  # fmt: skip

    def logits(tokens, position):
        return worker.actor.lm_head(worker.actor.states(torch.tensor([tokens])))[:, position]

    expected, kl = [], []
    for i, mask in enumerate(masks):
        first = int(ACTION[i].nonzero()[0]) + 1
        for p in mask.nonzero()[:, 0].tolist():
            begin, end = SPANS[i][p].tolist()
            student = logits(SEQUENCES[i, : p + 1].tolist(), -1)
            teacher = logits([*PROMPTS[i][begin:end].tolist(), *SEQUENCES[i, first : p + 1].tolist()], -1).detach()
            expected.append(per_token_loss(student, teacher, SEQUENCES[i, p + 1 : p + 2], DistillConfig(**options)))
            kl.append((teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum())
    torch.testing.assert_close(got.loss, torch.cat(expected).mean())
    total, count = got.means["teacher/context_kl"]
    assert count == len(kl) and total == pytest.approx(float(sum(kl).detach()), rel=1e-4)
    read_at = torch.nn.utils.rnn.pad_sequence([*SPANS, torch.zeros(7, 2)], batch_first=True)[:3, :, 1] > 0
    assert torch.equal(plugin.token_data(got)["active"], got.to_response_tokens(read_at))


def test_a_variant_with_several_contexts_scores_each_by_its_own_turns():
    """RLCSD: the right hint is read by turn, the wrong one whole; tokens without the right one keep their advantage."""
    config = RlcsdConfig(wrong_hints=1, threshold=0.0)
    worker = fake_worker(rlcsd=vars(config), teacher={"kind": "base"})
    plugin = RLCSD(worker.args)
    plugin.openrlhf_worker_setup(worker)
    spans = [SPANS[0], torch.where(SPANS[1] == torch.tensor([0, 2]), 0, SPANS[1]), SPANS[2]]  # the second turn only
    masks = [s[:, 1] > 0 for s in spans]
    wrong = {"teacher_prompt/1": [torch.tensor([9, 4]), torch.tensor([9, 9, 4]), PROMPTS[2]]}
    got = worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=PROMPTS, teacher_spans=spans,
                             loss_mask=masks, **wrong)  # fmt: skip
    data = plugin.token_data(got)
    assert data["active"].tolist() == [True] * 3 + [False, False, True] + [False] * 2
    assert data["active/1"].tolist() == [True] * 6 + [False] * 2
    moved = got.advantages[ACTION.bool()] / got.advantages[2, 0] != 1.0
    assert torch.equal(moved, data["in_loss"]) and torch.equal(data["in_loss"], data["active"])
