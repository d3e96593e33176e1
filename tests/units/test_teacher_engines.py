"""Teachers that engines score: the loss of a table, what is asked of an engine, what is made of its answers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from three_samples import ACTION, ATTENTION, MASKS, PROMPTS, SEQUENCES

from sdpo_plugin.algorithms import engine_scores
from sdpo_plugin.algorithms.fsd import FSD
from sdpo_plugin.algorithms.sdpo import SDPO
from sdpo_plugin.algorithms.srpo import SRPO
from sdpo_plugin.config import ConfigError, DistillConfig, TeacherConfig
from sdpo_plugin.distillation.fused import linear_distillation
from sdpo_plugin.distillation.head import Head, TeacherStates
from sdpo_plugin.distillation.loss import LOG_ZERO, TeacherTable, objective_of, token_divergence
from sdpo_plugin.interface.rollout_batch import Scores, ToScore
from sdpo_plugin.interface.scoring import TeacherPrompt
from sdpo_plugin.openrlhf_adapter.controller.teacher_engines import SeveralTeachers
from sdpo_plugin.openrlhf_adapter.controller.teacher_servers import Requests, scores_of
from sdpo_plugin.openrlhf_adapter.platform.cluster import own_engines
from sdpo_plugin.testing import fake_worker

N, V, H = 11, 23, 6
CONFIGS = {
    f"{alpha}-{'tail' if tail else 'renormalized'}": DistillConfig(
        alpha=alpha, topk=4, support="teacher", add_tail=tail, is_clip=None
    )
    for alpha, tail in itertools.product((0.0, 0.5, 1.0), (True, False))
} | {"sampled": DistillConfig(mode="sampled", alpha=1.0, is_clip=None)}


def table_of(teacher, token_ids, k) -> TeacherTable:
    """What an engine returns of these log-probabilities `[n, V]`."""
    log_probs, ids = teacher.topk(k, dim=-1)
    return TeacherTable(teacher.gather(-1, token_ids[:, None]).squeeze(-1), ids, log_probs)


# ── the loss ──


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_table_gives_the_loss_and_the_gradient_of_the_teacher_s_head(config):
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H).requires_grad_(), torch.randn(V, H).requires_grad_()
    teacher, taught = Head(torch.randn(V, H)), torch.randn(N, H)
    ids, weights = torch.randint(V, (N,)), torch.rand(N) * (torch.rand(N) < 0.7)
    whole = torch.log_softmax(taught @ teacher.weight.T, dim=-1)

    def both(given):
        output = linear_distillation(hidden, Head(weight), [given], ids, weights, objective_of(config), chunk_size=3)
        return output.loss, *torch.autograd.grad(output.loss, (hidden, weight))

    expected, found = both(TeacherStates(taught, teacher)), both(table_of(whole, ids, 4))
    assert all(x.abs().max() > 1e-3 for x in expected)
    torch.testing.assert_close(found, expected)


def test_entries_that_an_engine_did_not_return_count_nothing():
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(N, H), torch.randn(V, H), torch.randint(V, (N,))
    table = table_of(torch.log_softmax(torch.randn(N, V), dim=-1), ids, 4)
    padded = TeacherTable(
        table.sampled, torch.nn.functional.pad(table.ids, (0, 3)),
        torch.nn.functional.pad(table.log_probs, (0, 3), value=LOG_ZERO),
    )  # fmt: skip
    losses = [
        linear_distillation(hidden, Head(weight), [t], ids, torch.ones(N), objective_of(CONFIGS["0.5-tail"])).loss
        for t in (table, padded)
    ]
    torch.testing.assert_close(*losses)


def test_an_objective_that_reads_a_whole_distribution_is_told_so():
    table = table_of(torch.log_softmax(torch.randn(N, V), dim=-1), torch.zeros(N, dtype=torch.long), 4)
    with pytest.raises(ConfigError, match="--teacher.scored_by engine: this algorithm reads the teacher's whole"):
        linear_distillation(
            torch.randn(N, H), Head(torch.randn(V, H)), [table], torch.zeros(N, dtype=torch.long), torch.ones(N),
            lambda tokens: tokens.teacher_entropy,
        )  # fmt: skip


@given(st.integers(0, 10_000), st.integers(1, V))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_the_context_kl_of_tables_is_a_lower_bound(seed, k):
    """And the KL itself where the tables hold the vocabulary."""
    torch.manual_seed(seed)
    p, q = (torch.log_softmax(2 * torch.randn(5, V), dim=-1) for _ in range(2))
    tables = [x.topk(k, dim=-1)[::-1] for x in (p, q)]
    found = engine_scores._shared_kl(*tables[0], *tables[1])
    whole = token_divergence(q, p, alpha=0.0)
    assert (found <= whole + 1e-5).all() and (found >= -1e-6).all()
    if k == V:
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


# ── what is asked, and what is made of it ──


class Engines:
    """Answers with numbers by which one sees what was asked: position 7 of the sequence gets 7.0."""

    max_tokens = 100

    def score(self, requests, topk):
        self.asked = requests
        found = []
        for ids, start, _ in requests:
            at = torch.arange(start, len(ids))
            found.append(Scores(at.float(), at[:, None].expand(-1, topk).int(), at[:, None].expand(-1, topk).float()))
        return found


def batch_of(responses, observations=()):
    """Samples of one prompt token; `observations`: positions of the response that are no action's."""

    def mask(i):
        found = torch.ones(len(responses[i]), dtype=torch.bool)
        found[list(observations)] = False
        return found

    attached = {}
    return SimpleNamespace(
        teacher_engines=Engines(), response_mask=mask, response_ids=lambda i: responses[i],
        attach=attached.__setitem__, attached=attached, metrics={}, route=lambda i: None,
    )  # fmt: skip


def test_every_sample_is_scored_after_each_of_its_prompts():
    """Two turns with a token between them that is no action's; each turn has a prompt of its own."""
    first, second = torch.zeros(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    first[:2], second[3:] = True, True
    prompts = [[TeacherPrompt([1, 2, 3], {}, first), TeacherPrompt([9], {}, second)], []]
    batch = batch_of([[10, 11, 12, 13, 14], [20]], observations=(2,))
    batch.response_mask = lambda i: torch.tensor([True, True, False, True, True]) if i == 0 else torch.ones(1).bool()
    engine_scores.attach_engine_scores(batch, [prompts], topk=2)
    assert batch.teacher_engines.asked == [ToScore([1, 2, 3, 10, 11], 3), ToScore([9, 10, 11, 12, 13, 14], 1)]
    sampled, none = batch.attached["teacher_sampled"]
    assert sampled.tolist() == [3.0, 4.0, 4.0, 5.0] and none.tolist() == [0.0]
    assert batch.attached["teacher_ids"][0].tolist() == [[3, 3], [4, 4], [4, 4], [5, 5]]
    assert batch.attached["teacher_log_probs"][1].tolist() == [pytest.approx([LOG_ZERO] * 2)]
    assert batch.metrics["timing/teacher_score"] >= 0


@pytest.mark.usefixtures("device")
def test_the_policy_worker_distils_the_table_it_was_sent():
    options = {"topk": 5, "support": "teacher"}
    tables = []
    for row in range(3):
        n = int(ACTION[row].sum())
        log_probs, ids = torch.log_softmax(torch.randn(n, 31), dim=-1).topk(5)
        tables.append((torch.zeros(n), ids.int(), log_probs))
    names = ("teacher_sampled", "teacher_ids", "teacher_log_probs")
    losses = {}
    for engine in ({"scored_by": "engine", "kind": "base"}, {"kind": "base"}):
        worker = fake_worker(distill=options, teacher=engine)
        plugin = SDPO(worker.args)
        plugin.openrlhf_worker_setup(worker)
        data = {name: [table[at] for table in tables] for at, name in enumerate(names)}
        batch = worker.micro_batch(
            plugin, SEQUENCES, ATTENTION, ACTION, teacher_prompt=PROMPTS, loss_mask=MASKS, **data
        )
        batch.loss.backward()
        losses[engine.get("scored_by")] = batch.loss.item()
        assert worker.actor.lm_head.weight.grad.abs().sum() > 0
    assert losses["engine"] != pytest.approx(losses[None])


class Counted(Requests):
    max_tokens = 100

    def __init__(self):
        super().__init__()
        self.sent = []

    def _send(self, request, topk):
        self.sent.append(request)
        return request

    def _received(self, sent):
        return sent


def test_what_was_sent_ahead_is_not_sent_again_until_the_weights_may_have_changed():
    engines, first, second = Counted(), ToScore([1, 2, 3], 1), ToScore([1, 2, 3], 2)
    engines.begin([first, ToScore([9, 9], 1)], 2)
    assert engines.score([second, first, second], 2) == [second, first, second]
    assert engines.sent == [first, ToScore([9, 9], 1), second]
    engines.score([first], 2)
    assert engines.sent[3:] == [first]


# ── servers ──


def answer(*entries):
    return [None, *({str(token): {"logprob": p, "decoded_token": "x"} for token, p in at.items()} for at in entries)]


def test_a_server_s_answer_becomes_a_table():
    """Its second position has one token more than was asked for: the sampled one is not among the likeliest."""
    found = scores_of(ToScore([5, 6, 7], 1), answer({6: -0.5, 8: -1.0}, {9: -0.1, 8: -0.2, 7: -30.0}), 2)
    assert found.sampled.tolist() == pytest.approx([-0.5, -30.0])
    assert found.ids.tolist() == [[6, 8], [9, 8]]
    assert scores_of(ToScore([5, 6], 1), answer({6: -0.5}), 3).log_probs.tolist() == [
        pytest.approx([-0.5, LOG_ZERO, LOG_ZERO])
    ]


# ── settings ──

REFUSED = {
    "trust_region": ({"kind": "trust_region", "scored_by": "engine"}, "an engine cannot mix the logits"),
    "url without engine": ({"kind": "model", "url": "http://x"}, "--teacher.scored_by engine with it"),
    "url and model": (
        {"kind": "model", "scored_by": "engine", "url": "http://x", "model_name_or_path": "y"},
        "leave --teacher.model_name_or_path out",
    ),
    "routes": ({"kind": "model", "scored_by": "engine", "routes": "[1]", "route_key": "x"}, "give a JSON object"),
    "route_key": ({"kind": "model", "scored_by": "engine", "url": "http://x", "route_key": "x"}, "give both, or none"),
    "stage": ({"kind": "model", "model_name_or_path": "y", "zero_stage": 3, "scored_by": "engine"}, "leave it out"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**options)


@pytest.mark.parametrize("algorithm", [FSD, SRPO])
def test_variants_that_read_distributions_are_refused(algorithm):
    plugin = algorithm.__new__(algorithm)
    plugin.name = algorithm.name
    with pytest.raises(ConfigError, match=f"--algo {algorithm.name} reads the teacher's whole distribution"):
        plugin._require_tables_suffice()


ROUTES = '{"math": "model", "code": "http://host:1"}'
OWN = {
    "ema": (2, {"kind": "ema"}), "live": (0, {"kind": "live"}), "worker": (0, {"scored_by": "worker"}),
    "server": (0, {"kind": "model", "url": "http://host:1"}),
    "routes": (2, {"kind": "model", "routes": ROUTES, "route_key": "subject"}),
}  # fmt: skip


@pytest.mark.parametrize(("number", "options"), OWN.values(), ids=OWN)
def test_engines_of_the_teacher_s_own_need_gpus(number, options):
    config = TeacherConfig(**{"scored_by": "engine", "num_engines": 2, **options})
    assert own_engines(SimpleNamespace(teacher=SimpleNamespace(**vars(config)))) == number


def test_rows_are_routed_to_their_teacher_and_unknown_ones_refused():
    math, code = Engines(), Engines()
    math.begin = code.begin = lambda requests, topk: None
    asked = [ToScore([1, 2], 1, "code"), ToScore([1, 2, 3], 2, "math"), ToScore([4, 5, 6], 1, "code")]
    found = SeveralTeachers({"math": math, "code": code}).score(asked, 2)
    assert math.asked == asked[1:2] and code.asked == asked[::2]
    assert [scores.sampled.tolist() for scores in found] == [[1.0], [2.0], [1.0, 2.0]]
    config = TeacherConfig(kind="model", scored_by="engine", routes=ROUTES, route_key="subject")
    rows = Dataset.from_dict({"subject": ["math", "art"]})
    with pytest.raises(ConfigError, match="row 1 has 'art' there, which --teacher.routes does not name"):
        engine_scores.require_routes(rows, config)
    engine_scores.require_routes(rows.select([0]), config)
