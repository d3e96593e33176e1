"""Distillation from another model: whose tokens it reads, and which models can teach which."""

import math
from types import SimpleNamespace

import pytest
import torch

from sdpo_plugin.algorithms.compatibility import require_same_tokenizer
from sdpo_plugin.algorithms.opd import OPD
from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.context import Rollout
from sdpo_plugin.distillation.head import Head, match_vocab_size
from sdpo_plugin.interface.rollout_batch import RolloutBatch
from sdpo_plugin.testing import fake_worker, tiny_model

TEMPLATE = {"template": "{prompt}"}


def test_every_response_is_scored_after_the_student_s_own_tokens():
    """Whatever an agent or a cut made of the prompt."""
    samples = [SimpleNamespace(sequences=torch.tensor([[5, 6, 7, 8]]), action_mask=torch.tensor([[0, 1, 1]]))]
    experience = SimpleNamespace(index=[0], rewards=torch.zeros(1))
    args = fake_worker(reprompt=TEMPLATE).args
    batch, plugin = RolloutBatch(samples, [experience], args, None, math.inf), OPD(args)
    rollouts = [Rollout(0, "Q?", "4", None), Rollout(0, [{"role": "assistant", "content": "a"}], None, None)]
    (contexts,) = plugin.teacher_contexts(batch, rollouts)
    assert [context.active for context in contexts] == [True, False]
    assert plugin.teacher_prompt(batch, 0, contexts[0], batch.response_mask(0)) == ([5, 6], {})
    plugin.openrlhf_dataset({"prompt": [[{"role": "assistant", "content": "b"}]]}, False, args)


def test_with_a_section_only_samples_with_a_context_are_taught():
    args = fake_worker(reprompt={"template": "{prompt}{feedback}"}).args
    (contexts,) = OPD(args).teacher_contexts(None, [Rollout(0, "Q?", "4", 0.0, "no"), Rollout(0, "Q?", "5", 0.0)])
    assert [context.active for context in contexts] == [True, False]


def test_another_tokenizer_is_named_before_anything_loads(tmp_path):
    from transformers import AutoTokenizer

    student, other = tiny_model(tmp_path / "student"), tiny_model(tmp_path / "other")
    require_same_tokenizer(str(student), str(other))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(other)
    message = "other: another tokenizer than that of --actor.model_name_or_path .*student .token 102 is None in the st"
    with pytest.raises(ConfigError, match=message):
        require_same_tokenizer(str(student), str(other))


def test_vocabularies_that_are_padded_differently_are_compared_where_both_have_tokens():
    small, large = Head(torch.zeros(5, 3)), Head(torch.zeros(8, 4))
    assert [head.effective(1.0).weight.shape for head in match_vocab_size(small, large)] == [(5, 3), (5, 4)]
    assert match_vocab_size(small, small) == (small, small)
