"""The policy model around the LM head, on small modules."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest import LargestTensor
from transformers import AutoConfig, AutoModelForCausalLM

from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.platform import cpu

cpu.enable()
from sdpo_plugin.openrlhf_adapter.worker.actor import PolicyActor  # noqa: E402
from sdpo_plugin.openrlhf_adapter.worker.inputs import batches_within  # noqa: E402


class Model(torch.nn.Module):
    """A causal LM whose options stand in the text part of its configuration, as multimodal checkpoints have them."""

    def __init__(self, head=True, **options):
        super().__init__()
        text = SimpleNamespace(**options)
        self.config = SimpleNamespace(name_or_path="model", get_text_config=lambda: text)
        self.embedding, self.lm_head = torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16)
        self.has_head, self.options = head, text

    def get_output_embeddings(self):
        return self.lm_head if self.has_head else None

    def forward(self, ids, attention_mask, position_ids):
        logits = self.lm_head(self.embedding(ids) * 9.0) * getattr(self.options, "logit_scale", 1.0)
        if bound := getattr(self.options, "final_logit_softcapping", None):
            logits = torch.tanh(logits / bound) * bound
        return Output(logits=logits)


class Output(dict):
    @property
    def logits(self):
        return self["logits"]


class Engine(torch.nn.Module):
    """Of DeepSpeed's engine, what the policy model touches."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    @property
    def device(self):
        return next(self.module.parameters()).device

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def tapped(**options) -> PolicyActor:
    actor = PolicyActor(Engine(Model(**options)))
    actor.packing_samples = False
    actor.tap_head()
    return actor


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{}, {"final_logit_softcapping": 2.0}, {"logit_scale": 0.25}])
def test_scale_and_bound_of_the_logits_are_read_from_the_text_part_of_a_configuration(options):
    actor = tapped(**options)
    assert actor.head().softcap == options.get("final_logit_softcapping")
    assert actor.head().scale == options.get("logit_scale", 1.0)


def test_a_model_without_a_head_is_named():
    with pytest.raises(ConfigError, match=r"--actor.model_name_or_path model: a Model names no LM head"):
        tapped(head=False)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_frequencies_that_deepspeed_has_rounded_are_those_of_the_model_again(kind):
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    ids = torch.arange(900)[None] % 32
    logits = model(ids).logits
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                setattr(module, name, buffer.bfloat16())
    assert not torch.equal(model(ids).logits, logits)
    actor = PolicyActor(Engine(model))
    actor.packing_samples = False
    actor.tap_head()
    assert exact and all(torch.equal(buffer, exact[name]) for name, buffer in model.named_buffers() if name in exact)
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.usefixtures("device")
def test_what_the_head_computes_is_an_output_of_the_model():
    """Whoever hooks gradients on the outputs, as DeepSpeed does, meets the backward pass."""
    actor, seen = tapped(), []

    def watch(module, inputs, output):
        output["logits"].register_hook(lambda gradient: seen.append("output"))

    actor.model.module.register_forward_hook(watch)
    actor.model.module.embedding.weight.register_hook(lambda gradient: seen.append("weight"))
    ids, mask = torch.arange(8)[None], torch.ones(1, 8, dtype=torch.long)
    result, _ = actor.at_rows(lambda hidden: hidden.sum(), ids, mask, mask.bool())
    result.backward()
    assert seen == ["output", "weight"]


@pytest.mark.usefixtures("device")
def test_passes_of_few_tokens_equal_one_pass():
    torch.manual_seed(0)
    actor = tapped()
    ids = torch.randint(0, 16, (5, 9))
    mask = (torch.arange(9) < torch.tensor([9, 3, 6, 2, 9])[:, None]).long()
    rows = (torch.rand(5, 9) < 0.5) & mask.bool()
    whole = actor.hidden_states(ids, mask, rows, 1000)
    for max_tokens in (1, 9, 18):
        torch.testing.assert_close(actor.hidden_states(ids, mask, rows, max_tokens), whole, rtol=0, atol=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 200))
def test_batches_hold_every_sequence_once_within_the_tokens(lengths, max_tokens):
    batches = batches_within(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= max_tokens for b in batches)


class WithoutItsHead(Model):
    """Multiplies with its head's weight, and never calls the head."""

    def forward(self, ids, attention_mask, position_ids):
        return Output(logits=torch.nn.functional.linear(self.embedding(ids), self.lm_head.weight))


def test_a_model_that_never_calls_its_head_is_named():
    actor = PolicyActor(Engine(WithoutItsHead()))
    actor.packing_samples = False
    with pytest.raises(ConfigError, match="the logits of a WithoutItsHead are not made of its LM head's weight"):
        actor.tap_head()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_check_of_the_head_makes_no_float32_copy_of_it(dtype):
    model = Model()
    model.embedding, model.lm_head = torch.nn.Embedding(16, 64), torch.nn.Linear(64, 100_000)
    actor = PolicyActor(Engine(model.to(dtype)))
    actor.packing_samples = False
    with LargestTensor() as largest:
        actor.tap_head()
    assert largest.bytes <= 16 * 2**20 < 4 * model.lm_head.weight.numel()
