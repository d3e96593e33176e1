"""Feedback on one turn of an agent, on the real OpenRLHF: what the teacher reads for which turn, token by token."""

import json
from collections import defaultdict

import pytest
import torch
from common import ROWS, SDPO, ZERO, same

AGENT = """
import itertools, json, os, torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

numbers = itertools.count()

class Counter(AgentInstanceBase):
    "Three turns, in which a tool counts the letters that the student wrote; the second one's answer is silence."

    def __init__(self):
        self.number, self.turn = next(numbers), 0

    async def step(self, states, **kwargs):
        label, action, turn = int(states["label"]), states["action_text"], self.turn
        self.turn += 1
        answer = f"[{len(action)}]" if turn != 1 else ""
        said = {
            "feedback": f"after turn {turn}" if label in (0, 1, 2) and turn in (0, label) else None,
            "turn_feedback": f"{len(action)} letters in turn {turn}" if label % 4 != turn else None,
        }
        with open(os.path.join(os.path.dirname(__file__), "steps.jsonl"), "a") as file:
            file.write(json.dumps([self.number, action, answer, said]) + chr(10))
        return {"rewards": torch.tensor(0.0), "environment_feedback": answer, "done": turn == 2,
                "extra_logs": {"trajectory": self.number, **said}}

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Counter)

    async def execute(self, sampling_params, **given):
        sampling_params = sampling_params.clone()
        sampling_params.stop_token_ids = list(range(7, 102, 4))  # else an untrained model writes until nothing is left
        return await super().execute(sampling_params=sampling_params, **given)
"""
ENDS = {1, *range(7, 102, 4)}
FRAME = ("\nThe following is feedback from your unsuccessful earlier attempt:\n\n{}\n\n"
         "Correctly solve the original question.")  # fmt: skip
FLAGS = (*SDPO, *ZERO[3], "--teacher.max_tokens_per_gpu", "400")  # the ranks have different numbers of passes


@pytest.fixture(scope="module")
def played(openrlhf, model, tmp_path_factory):
    """A step of an agent: the run, what each step of each trajectory said, what the teacher read, the agent's file."""
    directory = tmp_path_factory.mktemp("turns")
    agent = directory / "agent.py"
    agent.write_text(AGENT)
    run = openrlhf(
        model, ROWS, "", *FLAGS, "--train.agent_func_path", str(agent),
        "--plugins", "sdpo_plugin.testing", "reads", "--reads.out", str(directory / "reads.jsonl"),
    )  # fmt: skip
    steps = defaultdict(list)
    for line in (directory / "steps.jsonl").read_text().splitlines():
        number, *step = json.loads(line)
        steps[number].append(step)
    reads = [json.loads(line) for line in (directory / "reads.jsonl").read_text().splitlines()]
    return run, steps, reads, str(agent)


@pytest.fixture(scope="module")
def tokens(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_teacher_scores_each_turn_after_its_own_feedback(played, tokens):
    run, steps, read, _ = played
    expected, scored, sampled = [], 0, 0
    for sample in run.samples[0]:
        ids, question = sample.sequences[0].tolist(), f"say {sample.labels[0]}"
        own = tokens(f"<|user|>{question}<|assistant|>")
        trajectory = steps[int(sample.info["trajectory"])]
        whole = "\n\n".join(said["feedback"] for _, _, said in trajectory if said["feedback"])
        of_prompt, at = defaultdict(list), len(own)
        for action, answer, said in trajectory:
            end = at + len(tokens(action))
            end += end < len(ids) and ids[end] in ENDS
            assert ids[at:end][: len(tokens(action))] == tokens(action) and end > at
            if shown := "\n\n".join(filter(None, [whole, said["turn_feedback"]])):
                of_prompt[shown] += range(at, end)
            sampled += end - at
            at = end + len(tokens(answer))
            assert ids[end:at] == tokens(answer)
        assert at == len(ids) and ids[: len(own)] == own
        for shown, predicted in of_prompt.items():
            prompt = tokens(f"<|user|>{question}{FRAME.format(shown)}<|assistant|>")
            moved = [position - len(own) + len(prompt) for position in predicted]
            expected.append([prompt + ids[len(own) : predicted[-1] + 1], moved])
            scored += len(predicted)
    assert {len(trajectory) for trajectory in steps.values()} == {3} and len(steps) == 16
    assert len(expected) == 2 * (5 * 3 + 3 * 2)  # of 3 of 8 prompts a turn is told nothing, and nor is the whole
    with_context = [pair for pair in read if FRAME[1:14] in text_of(pair, tokens)]
    assert sorted(with_context) == sorted(expected)
    assert run.metrics["train/self_distillation/token_fraction"][0][1] == pytest.approx(scored / sampled, rel=1e-3)
    assert 0.0 < scored / sampled < 1.0 and run.metrics["train/teacher/context_kl"][0][1] > 0.0


def text_of(pair, tokens):
    characters = {tokens(chr(c))[0]: chr(c) for c in range(32, 127)}
    return "".join(characters.get(i, "") for i in pair[0])


def test_feedback_on_turns_is_what_trains(played, openrlhf, model, tmp_path):
    """Without it the same samples give other weights; said of every turn, the trajectory's gives the same."""
    run, *_, agent = played

    def weights(name, change):
        (tmp_path / name).mkdir()
        samples = run.samples[0]
        for sample in samples:
            change(sample)
        torch.save(samples, tmp_path / name / "00000.pt")
        return openrlhf(model, ROWS, "", *FLAGS, "--train.agent_func_path", agent, "--testing.replay",
                        str(tmp_path / name), replay=run)  # fmt: skip

    def single_context(sample):
        sample.turns = [turn._replace(feedback=None) for turn in sample.turns]

    def of_every_turn(sample):
        sample.turns = [turn._replace(feedback=sample.feedback) for turn in sample.turns]
        sample.feedback = None

    single = weights("single", single_context)
    assert not same(single, run)
    assert same(weights("every", of_every_turn), single)
