"""The algorithm on a fake worker: what the teacher reads, which tokens count, and who follows whom."""

import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES, gradient

from sdpo_plugin import hookimpl, plugins
from sdpo_plugin.algorithms.opd import OPD
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.config import ConfigError, DistillConfig
from sdpo_plugin.distillation.loss import per_token_loss
from sdpo_plugin.interface import rollout_batch as rollout_module
from sdpo_plugin.interface.micro_batch import REQUIREMENTS, combined_requirements
from sdpo_plugin.interface.rollout_batch import RolloutBatch, SentRow
from sdpo_plugin.interface.scoring import ScoringRequest, teacher_inputs
from sdpo_plugin.testing import fake_worker


def algorithm(worker) -> SDPO:
    plugin = SDPO(worker.args)
    plugin.openrlhf_worker_setup(worker)
    return plugin


def step(worker, plugin, prompts=PROMPTS, masks=MASKS):
    return worker.micro_batch(plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=prompts, loss_mask=masks)


def per_token(micro_batch) -> float:
    total, count = micro_batch.means["self_distillation/loss"]
    return total / count


@pytest.mark.usefixtures("device")
def test_everything_after_the_prompt_is_replayed():
    reads = [ScoringRequest(i, PROMPTS[i], ACTION[i].bool()) for i in range(2)]
    sequences, attention, rows, scored = teacher_inputs(SEQUENCES, ACTION, reads)
    assert sequences.tolist() == [[7, 7, 7, 7, 2, 11, 12, 13], [8, 5, 21, 22, 9, 9, 23, 0]]
    assert attention.tolist() == [[1] * 8, [1] * 7 + [0]]
    assert torch.roll(sequences, -1, 1)[rows].tolist() == [11, 12, 13, 21, 22, 23]  # the same tokens are predicted
    assert torch.stack(scored, dim=1).tolist() == ACTION[:2].nonzero().tolist()


@pytest.mark.usefixtures("device")
def test_without_any_context_two_tokens_stand_in():
    sequences, _, rows, (samples, positions) = teacher_inputs(SEQUENCES, ACTION, [])
    assert sequences.tolist() == [[1, 2]] and not rows.any() and len(samples) == len(positions) == 0


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_the_loss_is_the_definition_on_the_tokens_with_a_context(mode):
    options = {"mode": mode, "alpha": 1.0, "topk": 5}
    worker = fake_worker(distill=options | {"loss_agg_mode": "token-mean"})
    plugin = algorithm(worker)
    got = step(worker, plugin)
    expected = []
    for i in range(2):
        length = int(ATTENTION[i].sum())
        first = int(ACTION[i].nonzero()[0]) + 1
        replayed = torch.cat([PROMPTS[i], SEQUENCES[i, first:length]])[None]
        for p in ACTION[i].nonzero()[:, 0].tolist():
            student = worker.actor.lm_head(worker.actor.states(SEQUENCES[i : i + 1]))[:, p]
            teacher = worker.actor.lm_head(worker.actor.states(replayed))[:, p - first + len(PROMPTS[i])]
            config = DistillConfig(**options)
            expected.append(per_token_loss(student, teacher, SEQUENCES[i, p + 1 : p + 2], config))
    torch.testing.assert_close(got.loss, torch.cat(expected).mean())
    assert got.means["self_distillation/token_fraction"] == (6, 8)
    assert per_token(got) == pytest.approx(got.loss.item())


@pytest.mark.usefixtures("device")
def test_samples_without_a_context_are_scored_only_where_something_else_requires_them():
    worker = fake_worker()
    got = step(worker, algorithm(worker))
    assert got.sample_mask.tolist() == [True, True, False] and len(got.head_output.log_probs) == 6
    for options in ({"distill": {"weight": 0.5}}, {"actor": {"entropy_coef": 0.0}}, {"actor": {"aux_loss_coef": 0.1}}):
        worker = fake_worker(**options)
        got = step(worker, algorithm(worker))
        assert got.sample_mask is None and len(got.head_output.log_probs) == 8


def needs(**options):
    args = fake_worker(**options).args
    return SDPO(args).openrlhf_requirements(args) if SDPO.is_enabled(args) else None


def corrected(level):
    return {"advantage": SimpleNamespace(is_correction_level=level)}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False), ({"distill": {"weight": 0.5}}, True), ({"train": {"max_epochs": 2}}, True),
        ({"train": {"batch_size": 2}}, True), ({"train": {"batch_size": 2, "async_enable": True}}, True),
        ({"train": {"async_enable": True}}, False), ({"algo": corrected("token")}, False),
        ({"algo": corrected("seq")}, True),
        ({"algo": {"kl": SimpleNamespace(use_loss=False, init_coef=0.1)}}, True), ({"distill": {"weight": 0.0}}, True),
    ],
)  # fmt: skip
def test_old_log_probabilities_are_made_only_where_something_uses_them(options, wanted):
    assert combined_requirements([needs(**options)])["old_log_probs"] is wanted


def test_what_one_plugin_needs_is_there_whoever_else_has_no_use_for_it():
    algorithm = needs()
    assert combined_requirements([]) == {
        "old_log_probs": True, "log_probs": True, "all_samples": True, "entropy": False
    }  # fmt: skip
    assert combined_requirements([algorithm, None]) == dict.fromkeys(REQUIREMENTS, False)
    for order in ([algorithm, dict.fromkeys(REQUIREMENTS, True)], [dict.fromkeys(REQUIREMENTS, True), algorithm]):
        assert combined_requirements(order) == dict.fromkeys(REQUIREMENTS, True)
    with pytest.raises(ConfigError, match="openrlhf_requirements: a plugin names logits; choose from old_log_probs, "):
        combined_requirements([{"logits": True}])


@pytest.mark.usefixtures("device")
def test_log_probabilities_that_nobody_requires_can_be_used_but_not_differentiated():
    worker = fake_worker()
    got = step(worker, algorithm(worker))
    assert got.log_probs.sum() < 0
    with pytest.raises(ConfigError, match='return {"log_probs": True} from openrlhf_requirements'):
        got.log_probs.sum().backward()


def losses(worker, **log_probs):
    data = {"teacher_prompt": PROMPTS, "loss_mask": MASKS}
    return worker.micro_batch(algorithm(worker), SEQUENCES, ATTENTION, ACTION, **data, **log_probs).head_output


def of_tokens(*values) -> torch.Tensor:
    """[B, A] with `values` at the action positions of the first two samples."""
    return torch.zeros(ACTION.shape).masked_scatter(ACTION.bool() & torch.tensor([[True], [True], [False]]),
                                                    torch.tensor(values))


@pytest.mark.usefixtures("device")
def test_the_rollout_correction_is_the_student_s_ratio_to_the_engine_with_one_update():
    """min(student / engine, 2) of each token, where the policy before the update is the student itself."""
    plain = losses(fake_worker())
    student = plain.log_probs[:6]
    shift = torch.tensor([0.0, 0.5, 2.0, -1.0, 0.0, -3.0])  # of the engine: student / engine = exp(shift)
    factors = torch.tensor([1.0, 1.6487, 2.0, 0.3679, 1.0, 0.0498])
    got = losses(fake_worker(algo=corrected("token")), rollout_log_probs=of_tokens(*(student - shift).tolist()))
    torch.testing.assert_close(got.token_loss[:6], plain.token_loss[:6] * factors, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("device")
def test_ratio_and_rollout_correction_are_two_factors_with_several_updates():
    """min(student / old, 2) * min(old / engine, 2), each clipped by itself; neither is counted twice."""
    plain, several = losses(fake_worker(distill={"is_clip": None})), {"train": {"max_epochs": 2}}
    student = plain.log_probs[:6]
    to_old, to_engine = torch.tensor([0.5, 0.5, 2.0, 2.0, -1.0, 0.0]), torch.tensor([0.5, 2.0, 2.0, -1.0, 2.0, 0.0])
    expected = to_old.exp().clamp(max=2.0) * to_engine.exp().clamp(max=2.0)
    given = {"old_log_probs": of_tokens(*(student - to_old).tolist()),
             "rollout_log_probs": of_tokens(*(student - to_old - to_engine).tolist())}
    shares = torch.tensor([1 / 9] * 6)
    got = losses(fake_worker(algo=corrected("token"), **several), **given)
    torch.testing.assert_close(got.loss, (plain.token_loss[:6] * shares * expected).sum(), rtol=1e-4, atol=1e-6)
    uncorrected = losses(fake_worker(**several), **given)
    ratios = plain.token_loss[:6] * to_old.exp().clamp(max=2.0)
    torch.testing.assert_close(uncorrected.token_loss[:6], ratios, rtol=1e-4, atol=1e-6)


def test_a_rollout_without_log_probabilities_is_named():
    with pytest.raises(ConfigError, match="is_correction_level token: the rollout has no log-probabilities; give"):
        losses(fake_worker(algo=corrected("token")))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("mode", "shares"), [("seq-mean-token-mean", [1 / 9] * 6), ("token-mean", [1 / 6] * 6)])
def test_both_means(mode, shares):
    """Three samples, of three, three and two tokens; the third has no context and counts in the mean over samples."""
    worker = fake_worker(distill={"loss_agg_mode": mode})
    got = step(worker, algorithm(worker))
    torch.testing.assert_close(got.loss.detach(), (got.head_output.token_loss[:6] * torch.tensor(shares)).sum())
    assert per_token(got) == pytest.approx(got.head_output.token_loss[:6].mean().item())


@pytest.mark.usefixtures("device")
def test_a_sample_s_mean_is_over_its_tokens_in_the_loss():
    """One of three, three of three and none of two."""
    one = MASKS[0] & (MASKS[0].cumsum(0) == 2)
    worker = fake_worker()
    got = step(worker, algorithm(worker), masks=[one, *MASKS[1:]])
    shares = torch.tensor([1 / 3] + [1 / 9] * 3)
    torch.testing.assert_close(got.loss.detach(), (got.head_output.token_loss[[1, 3, 4, 5]] * shares).sum())


@pytest.mark.usefixtures("device")
def test_hybrid_mixes_gradients_and_zero_is_the_host():
    parts = {}
    for weight in (0.0, 0.25, 1.0):
        worker = fake_worker(distill={"weight": weight})
        # At weight 0 no algorithm is registered; made all the same, it leaves the loss alone.
        parts[weight] = gradient(worker, step(worker, algorithm(worker)).loss)
    torch.testing.assert_close(parts[0.25], 0.75 * parts[0.0] + 0.25 * parts[1.0], atol=1e-6, rtol=1e-5)
    assert SDPO.is_enabled(fake_worker().args) and not SDPO.is_enabled(fake_worker(distill={"weight": 0.0}).args)


@pytest.mark.usefixtures("device")
def test_a_batch_without_context_has_a_zero_loss_that_backpropagates():
    worker = fake_worker()
    empty = [torch.tensor([], dtype=torch.long)] * 3
    got = step(worker, algorithm(worker), empty, [torch.zeros(7, dtype=torch.bool)] * 3)
    assert got.loss.item() == 0.0 and not gradient(worker, got.loss).any()
    assert got.metrics["self_distillation/empty_target_batch"] == 1.0


@pytest.mark.usefixtures("device")
def test_a_micro_batch_without_any_response_token_has_metrics():
    worker = fake_worker()
    nothing = torch.zeros_like(ACTION)
    none, masks = [torch.tensor([], dtype=torch.long)] * 3, [torch.zeros(7, dtype=torch.bool)] * 3
    got = worker.micro_batch(algorithm(worker), SEQUENCES, ATTENTION, nothing, teacher_prompt=none, loss_mask=masks)
    assert got.loss.item() == 0.0
    assert all(math.isfinite(value) for value in got.metrics.values())
    assert all(math.isfinite(value) for pair in got.means.values() for value in pair)


@pytest.fixture(scope="module")
def rollout_batch(model):
    """`rollout_batch(responses, rewards, truncated, **options)`: a batch on the controller, two samples a prompt."""
    from transformers import AutoTokenizer

    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.controller.rollout import max_seq_len

    tokenizer = AutoTokenizer.from_pretrained(model)

    def batch(responses, rewards, truncated=None, **options):
        samples = []
        for response, cut in zip(responses, truncated or [False] * len(responses), strict=True):
            prompt, ids = ([tokenizer(text)["input_ids"] for text in ("<|user|>Q?<|assistant|>", response or "")])
            samples.append(
                SimpleNamespace(
                    sequences=torch.tensor([prompt + ids]), truncated=torch.tensor([cut]), feedback=None, turns=[],
                    action_mask=torch.tensor([[0] * (len(prompt) - 1) + [1] * len(ids)]),
                    prompts=["<|user|>Q?<|assistant|>"], record={"prompt": [{"role": "user", "content": "Q?"}]},
                )  # fmt: skip
            )
        experience = SimpleNamespace(index=list(range(len(samples))), rewards=torch.tensor(rewards), info={})
        args = fake_worker(**options).args
        batch = RolloutBatch(samples, [experience], args, tokenizer, max_seq_len(str(model)))
        SDPO(args).openrlhf_rollout_batch(batch)
        read = [tokenizer.decode(ids) for ids in experience.info["plugin/teacher_prompt"]]
        masks = [mask.sum().item() for mask in experience.info["plugin/loss_mask"]]
        return read, masks, {name.removeprefix("self_distillation/"): value for name, value in batch.metrics.items()}

    return batch


def test_a_sample_without_an_action_neither_teaches_nor_is_taught(rollout_batch):
    read, masks, metrics = rollout_batch([None, "four", "five", None], [1.0, 0.0, 1.0, 0.0])
    assert read == ["", "", "", ""] and masks == [0, 0, 0, 0]
    assert metrics["reprompt_sample_fraction"] == 0.0 and metrics["success_group_fraction"] == 0.5
    read, masks, metrics = rollout_batch([None, "four", "five", "six"], [1.0, 0.0, 1.0, 0.0])
    assert read[:3] == ["", "", ""] and "five" in read[3] and masks == [0, 0, 0, 3]
    assert metrics["inactive_group_fraction"] == 0.5 and metrics["response_length_min"] == 0.0


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_truncated_responses_teach_and_may_be_left_out(rollout_batch, mask_truncated):
    read, masks, metrics = rollout_batch(
        ["right", "wrong", "righteous", "no"], [1.0, 0.0, 1.0, 0.0], [True, False, False, True],
        distill={"mask_truncated": mask_truncated},
    )  # fmt: skip
    assert "right" in read[1] and masks[1] == 5
    assert masks[3] == 0 if mask_truncated else masks[3] == 2
    assert read[3] == "" if mask_truncated else "righteous" in read[3]
    assert metrics["reprompt_sample_fraction"] == (0.25 if mask_truncated else 0.5)


def test_samples_whose_tokens_are_all_skipped_need_no_teacher(rollout_batch):
    read, masks, metrics = rollout_batch(["right", "no"], [1.0, 0.0], distill={"skip_tokens": 2})
    assert read == ["", ""] and masks == [0, 0] and metrics["reprompt_sample_fraction"] == 0.0


def test_a_teacher_s_prompt_and_its_response_fit_the_model_s_positions(rollout_batch):
    """A model of 512 positions, a token a character: a success of 300, and failures that leave more or less room."""
    success, failures = "s" * 300, {"short": "f" * 50, "long": "f" * 200, "too long": "f" * 480}
    found = {name: rollout_batch([success, failure], [1.0, 0.0]) for name, failure in failures.items()}
    for name, (read, masks, metrics) in found.items():
        fits = name != "too long"
        assert masks == [0, len(failures[name]) * fits] and metrics["too_long_fraction"] == 0.5 * (not fits)
        assert metrics["reprompt_sample_fraction"] == 0.5 * fits
        assert metrics["truncated_fraction"] == 0.5 * (name == "long")
        assert read[1].count("s" * 100) == {"short": 3, "long": 2, "too long": 0}[name]
        tokens = len(re.sub(r"<\|\w+\|>", ".", read[1]))
        assert tokens + len(failures[name]) == 512 if name == "long" else tokens < 400


def test_lengths_of_responses_and_of_those_that_ended(rollout_batch):
    _, _, metrics = rollout_batch(["a", "abcd", "abc", "abcdefgh"], [0.0] * 4, [False, False, True, True])
    expected = {"response_length": (1, 8), "terminated_length": (1, 4)}
    for name, (least, most) in expected.items():
        assert (metrics[f"{name}_min"], metrics[f"{name}_max"]) == (least, most)
    assert metrics["terminated_length_mean"] == 2.5
    assert "terminated_length_mean" not in rollout_batch(["a", "b"], [0.0, 0.0], [True, True])[2]


def test_a_generation_prompt_has_the_chat_template_s_arguments(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += "{% if style %}{{ style }}: {% endif %}"
    args = fake_worker(
        distill={"generate_from_teacher": True}, reprompt={"template": "{prompt}{privileged_context}"},
        data={"chat_template_kwargs": '{"style": "in short"}', "max_len": 512}, rollout={"max_new_tokens": 8},
    ).args
    record = {"prompt": "Q?", "privileged_context": " it is 4"}
    ids = SDPO(args).openrlhf_generation_prompt("", record, tokenizer, args)
    assert tokenizer.decode(ids) == "<|user|>Q? it is 4<|assistant|>in short: "


@hookimpl
def openrlhf_answer(response, record, args):
    """A plugin's own: what follows the last colon; a response without one has no answer."""
    return response.rpartition(":")[2] if ":" in response else ""


def test_answers_are_found_by_a_plugin_or_as_the_maths_environment_does(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def answers(*responses, plugin=None, demonstration="consensus"):
        args = fake_worker(reprompt={"demonstration": demonstration}).args
        args.plugins = []
        args.algo.name = None
        manager = plugins.activate(args)
        if plugin is not None:
            manager.register(plugin)
        samples = []
        for response, truncated in responses:
            ids = tokenizer(f"<|user|>Q?<|assistant|>{response}", add_special_tokens=False)["input_ids"]
            mask = torch.ones(1, len(ids) - 1, dtype=torch.long)
            mask[0, :3] = 0
            samples.append(SimpleNamespace(
                sequences=torch.tensor([ids]), truncated=torch.tensor([truncated]), feedback=None, turns=[],
                action_mask=mask, record={"prompt": "Q?"},
            ))  # fmt: skip
        batch = RolloutBatch(samples, [], args, tokenizer, math.inf)
        return [rollout.answer for rollout in SDPO(args).rollouts(batch)]

    half = ("so it is \\boxed{0.5}", False), ("The answer is 1/2.", False), ("\\boxed{0.5}", True), ("hm", False)
    assert answers(*half) == ["1/2", "1/2", None, "hm"]
    assert answers(*half, demonstration="first") == [None] * 4
    own = SimpleNamespace(openrlhf_answer=openrlhf_answer)
    assert answers(("it: 4", False), ("\\boxed{4}", False), plugin=own) == [" 4", None]


THINKS = "{% if thinks is defined %}<{{ thinks }}>{% endif %}"


def test_the_teacher_s_prompts_have_chat_template_arguments_of_their_own(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += THINKS + "{{ style }}"

    def prompts(own, algorithm=SDPO, template="{prompt}{feedback}", feedback=" no", **config):
        text = "<|user|>Q?<|assistant|><no>short"
        ids = tokenizer(text + "4", add_special_tokens=False)["input_ids"]
        sample = SimpleNamespace(
            sequences=torch.tensor([ids]), truncated=torch.tensor([False]), feedback=feedback, turns=[], prompts=[text],
            action_mask=torch.tensor([[0] * (len(ids) - 2) + [1]]), record={"prompt": "Q?"},
        )  # fmt: skip
        experience = SimpleNamespace(index=[0], rewards=torch.zeros(1), info={})
        reprompt = {"chat_template_kwargs": own, "template": template, "feedback_template": "{feedback_raw}", **config}
        args = fake_worker(reprompt=reprompt, data={"chat_template_kwargs": '{"thinks": "no", "style": "short"}'}).args
        batch = RolloutBatch([sample], [experience], args, tokenizer, 512)
        assert batch.prompt(0) == [{"role": "user", "content": "Q?"}]  # the student's has not changed
        algorithm(args).openrlhf_rollout_batch(batch)
        found = (experience.info.get(f"plugin/{name}") for name in ("teacher_prompt", "bare_prompt"))
        return [None if ids is None else tokenizer.decode(ids[0]) for ids in found]

    assert prompts(None) == ["<|user|>Q? no<|assistant|><no>short", None]
    own = '{"thinks": "yes"}'
    assert prompts(own) == ["<|user|>Q? no<|assistant|><yes>short", "<|user|>Q?<|assistant|><yes>short"]
    assert prompts(own, feedback=None) == ["", None]
    # With the student's prompt alone, another model may still have another template.
    assert prompts(None, OPD, "{prompt}", None)[0] == "<|user|>Q?<|assistant|><no>short"
    assert prompts(own, OPD, "{prompt}", None)[0] == "<|user|>Q?<|assistant|><yes>short"


def test_the_context_kl_is_of_the_context_alone():
    """Where the teacher's chat template has other arguments, so has its prompt without a context."""
    worker = fake_worker()
    bare = [torch.tensor([9, 9, 9]), torch.tensor([5, 9]), torch.tensor([], dtype=torch.long)]
    failed = [torch.tensor(True)] * 3
    found = []
    for own in ({}, {"bare_prompt": bare}, {"bare_prompt": PROMPTS}):
        data = {"teacher_prompt": PROMPTS, "loss_mask": MASKS, "failed": failed, **own}
        got = worker.micro_batch(algorithm(worker), SEQUENCES, ATTENTION, ACTION, **data)
        found.append(float(got.means["teacher/context_kl"][0]))
    student, other, same = found
    assert student > 0.0 and other > 0.0 and other != pytest.approx(student) and same == pytest.approx(0.0, abs=1e-5)


def test_an_asynchronous_run_sends_the_columns_that_are_read():
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.controller.rollout import sent_columns

    row = {"prompt": "Q?", "privileged_context": "4", "note": "n" * 10_000, "tests": "t" * 10_000, "level": None}
    own = SimpleNamespace(openrlhf_record_columns=hookimpl(lambda args: ["note", "unheard_of"]))

    def sent(template=None, plugin=None):
        args = fake_worker(reprompt={} if template is None else {"template": template}).args
        args.plugins = []
        manager = plugins.activate(args)
        if plugin is not None:
            manager.register(plugin)
        return pickle.loads(pickle.dumps(SentRow(row, sent_columns(args))))

    assert sent() == {"prompt": "Q?"} and len(pickle.dumps(sent())) < 500
    assert sent("{prompt}{privileged_context}") == {"prompt": "Q?", "privileged_context": "4"}
    found = sent(plugin=own)
    assert found == {"prompt": "Q?", "note": "n" * 10_000} and found.get("unheard_of", 1) == 1
    for read in (lambda: found["tests"], lambda: found.get("level")):
        with pytest.raises(KeyError, match="asynchronous runs send only the columns .* openrlhf_record_columns"):
            read()
    with pytest.raises(KeyError, match="^'unheard_of'$"):
        found["unheard_of"]


def test_a_vocabulary_is_not_rebuilt_for_each_sample(rollout_batch, monkeypatch):
    """`len(tokenizer)` does it: 50 ms at 151,643 tokens, for each of a thousand samples."""
    from transformers import PreTrainedTokenizerFast

    asked, length = [], PreTrainedTokenizerFast.__len__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__len__", lambda self: (asked.append(1), length(self))[1])
    read, *_ = rollout_batch(["right", "wrong"] * 8, [1.0, 0.0] * 8)
    assert read[1] and len(asked) <= 1


def test_siblings_share_what_was_made_of_their_prompt(rollout_batch, monkeypatch):
    made, own = [], rollout_module.prompt_as_scored
    monkeypatch.setattr(rollout_module, "prompt_as_scored", lambda *args: (made.append(1), own(*args))[1])
    rollout_batch(["right", "wrong"] * 8, [1.0, 0.0] * 8)
    assert len(made) == 1


def test_skipped_tokens_leave_the_loss():
    args = fake_worker(distill={"skip_tokens": 2}).args
    sample, experience = SimpleNamespace(action_mask=ACTION[1:2]), SimpleNamespace(index=[0], rewards=torch.zeros(1))
    batch = RolloutBatch([sample], [experience], args, None, math.inf)
    assert SDPO(args).loss_mask(batch, 0, active=[True]).tolist() == [False] * 6 + [True]
    assert not SDPO(args).loss_mask(batch, 0, active=[False]).any()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("kind", "follows"), [("live", 1.0), ("base", 0.0), ("ema", 0.25)])
def test_teachers_follow_the_student(kind, follows):
    worker = fake_worker(teacher={"kind": kind, "update_rate": 0.25})
    plugin = algorithm(worker)
    start = worker.actor.mix.weight.detach().clone()
    with torch.no_grad():
        worker.actor.mix.weight += 1.0
    plugin.openrlhf_optimizer_step(worker)
    torch.testing.assert_close(plugin.teacher.model.mix.weight, start + follows)


def test_a_checkpoint_without_a_teacher_is_named(tmp_path):
    worker = fake_worker()
    with pytest.raises(ConfigError, match="written without --teacher.kind ema"):
        algorithm(worker).openrlhf_load_checkpoint(worker, str(tmp_path))


def test_prompts_without_a_user_turn_are_rejected_before_training():
    rows = {"prompt": [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]}
    args = fake_worker().args
    with pytest.raises(ConfigError, match="--data.input_key prompt: row 1 has no user turn at its end"):
        SDPO(args).openrlhf_dataset(rows, False, args)
    SDPO(args).openrlhf_dataset(rows, True, args)  # where no teacher reads them
