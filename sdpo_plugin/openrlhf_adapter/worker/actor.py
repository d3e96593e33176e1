"""The policy model: one micro-batch in, hidden states at response positions, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.fused import linear_log_probs
from sdpo_plugin.distillation.head import Head
from sdpo_plugin.distillation.products import head_products, sum_dtype
from sdpo_plugin.interface.micro_batch import MicroBatch
from sdpo_plugin.interface.models import Images
from sdpo_plugin.interface.transport import response_rows
from sdpo_plugin.openrlhf_adapter.patch_points import overrides, patch_point
from sdpo_plugin.openrlhf_adapter.worker import lora
from sdpo_plugin.openrlhf_adapter.worker.inputs import batches_within, merge_mm_train_inputs, model_inputs, only
from sdpo_plugin.openrlhf_adapter.worker.ring import NoRing, current_ring
from sdpo_plugin.openrlhf_adapter.worker.zero import exact_frequencies, gathered, is_partitioned, trace_for_scoring


class HeadTap:
    """Puts a function in the place of a causal LM's head, inside the model's own forward pass.

    There the head's weights are whole at every ZeRO stage, and DeepSpeed's hooks, which surround the module, hold
    for whatever the function computes. What the model does with logits afterwards gets a dummy. The function's result
    then takes the logits' place in the model's output: DeepSpeed learns from a gradient that arrives at an output that
    a backward pass has begun, and with it whether this one ends an accumulation (`DeepSpeedEngine.forward`).
    """

    def __init__(self, model: Any) -> None:
        """Call after DeepSpeed wrapped the model: its hooks on the head are to run before ours."""
        self.module = model.get_output_embeddings()
        self._function: Callable[[torch.Tensor], Any] | None = None
        self._result: Any = None
        self._forward = self.module.forward
        self.module.forward = self._call
        self.module.register_forward_hook(self._keep)
        # Before DeepSpeed's, and inside of PEFT's wrappers: all that look at the model's output see the result.
        causal_lm = model.get_base_model() if isinstance(model, lora.PeftModel) else model
        causal_lm.register_forward_hook(self._hand_over, prepend=True)

    @contextmanager
    def replaced_by(self, function: Callable[[torch.Tensor], Any]) -> Iterator[None]:
        """While active, `function(hidden [B, S, H])` (a tensor or a tuple of them) runs as the head: the `logits`."""
        self._function = function
        try:
            yield
        finally:
            self._function = self._result = None

    def _call(self, hidden: torch.Tensor) -> Any:
        return self._forward(hidden) if self._function is None else self._function(hidden)

    def _keep(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> Any:
        if self._function is None:
            return None
        self._result = output
        return inputs[0].new_zeros(1, 1, 1)

    def _hand_over(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> Any:
        if self._function is not None:
            output["logits"] = self._result
        return output


_Actor: Any = patch_point("openrlhf.trainer.ray.ppo_actor:Actor")


class PolicyActor(_Actor):
    """models/actor.py: `Actor`, whose head can be restricted to response positions once `tap_head` was called."""

    tap: Any = None  # a `HeadTap`, from `tap_head` on
    micro_batch: MicroBatch | None = None

    def __init__(self, pretrain: str, on_built: Callable[..., Any] | None = None, **built_with: Any) -> None:
        super().__init__(pretrain, **built_with)
        self.built_with = built_with
        if on_built is not None:
            on_built(actor=self)

    @contextmanager
    def using(self, micro_batch: MicroBatch) -> Iterator[None]:
        """While active, `forward` follows `micro_batch`, and stores `head_output` and `entropy` there."""
        self.micro_batch = micro_batch
        try:
            yield
        finally:
            self.micro_batch = None

    def add_teacher_adapter(self) -> None:
        """Of a LoRA model, before DeepSpeed wraps it: a frozen second adapter (`PolicyWorker.teacher_model`)."""
        lora.add_teacher(self.model)

    @torch.no_grad()
    def tap_head(self) -> None:
        """Call after DeepSpeed wrapped the model, on every rank.

        Raises:
            ConfigError: the model's logits are not those of the head as we read it from its configuration.
        """
        head = self.model.module.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"--actor.model_name_or_path {self.model.module.config.name_or_path}: a "
                f"{type(self.model.module).__name__} names no LM head (get_output_embeddings() is None), which is "
                "where the loss is computed; give a causal language model"
            )
        if isinstance(head, lora.LoraLayer):
            raise ConfigError(
                "--ds.lora.target_modules: an adapter on the LM head is not supported; leave the head out"
            )
        whole = self.model.module
        exact_frequencies(whole.get_base_model() if isinstance(whole, lora.PeftModel) else whole)
        ids = torch.arange(8, device=self.model.device).repeat(self.ring.size)[None]  # 8 of them on every rank
        mask = torch.ones_like(ids)
        training = self.model.training
        self.model.eval()
        tokens, others, _ = model_inputs(self, ids, mask, mask.bool())
        logits = self.model(tokens, **others).logits[0].float()
        self.tap = HeadTap(self.model.module)

        def read(hidden: torch.Tensor) -> torch.Tensor:
            head = self.head()
            products = hidden.new_empty(len(hidden), len(head.weight), dtype=sum_dtype(head.weight))
            return head.logits(head_products(hidden, head, products))

        ours, _ = self.at_rows(read, ids, mask, mask.bool())
        self.model.train(training)
        # A model that never calls its head has none of ours. The bound is far above bf16's rounding.
        if ours is None or (logits - ours).abs().max() > 0.05 * logits.abs().max():
            raise ConfigError(
                f"--actor.model_name_or_path {self.model.module.config.name_or_path}: the logits of a "
                f"{type(self.model.module).__name__} are not made of its LM head's weight, bias, scale and soft-cap "
                "alone; such a head is not supported"
            )

    # Long: OpenRLHF's one forward pass, with its head in place or replaced, has all of these results.
    @overrides(
        "sequences", "action_mask", "attention_mask", "return_output", "ring_attn_group", "packed_seq_lens",
        "return_entropy",
    )  # fmt: skip
    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
        return_entropy: bool = False,
        **images: torch.Tensor,
    ) -> Any:
        """As OpenRLHF's, but logits exist at response positions only, and a chunk at a time.

        In a micro-batch with `sample_mask` (bool [B]) the model's input is those samples; the others' results are zero.

        Args:
            sequences, attention_mask: int64 [B, S]. action_mask: [B, A].
            images: what the processor made of all samples' images, if they have any.

        Returns:
            Log-probabilities float32 [B, A], zero where the mask is, and with `return_output` the model's output
            with `entropy` [B, A] where asked.
        """
        micro_batch = self.micro_batch
        if micro_batch is not None and micro_batch.required["entropy"]:
            return_entropy = True
        if self.tap is None or action_mask is None:
            result = super().forward(
                sequences, action_mask, attention_mask, return_output, ring_attn_group=ring_attn_group,
                packed_seq_lens=packed_seq_lens, return_entropy=return_entropy, **images,
            )  # fmt: skip
            if action_mask is not None and micro_batch is not None and micro_batch.required["entropy"]:
                micro_batch.entropy = result[1].entropy[:, -action_mask.shape[1] :]
            return result
        assert attention_mask is not None
        mask = action_mask.bool()
        if micro_batch is not None and micro_batch.sample_mask is not None:
            mask = mask & micro_batch.sample_mask[:, None]
            chosen = micro_batch.sample_mask
            if micro_batch.images is not None:
                read = chosen.tolist() if chosen.any() else [True]
                of_read = [own for own, is_read in zip(micro_batch.images, read, strict=False) if is_read]
                images = merge_mm_train_inputs(of_read, sequences.device)
            sequences, attention_mask, action_mask = only(
                chosen, sequences, attention_mask, action_mask, whole=micro_batch.images is not None
            )
        ring, rows, attended = self.ring, response_rows(action_mask, sequences), attention_mask.bool()
        targets = torch.roll(sequences, -1, dims=1)[ring.local(rows, attended)]

        def run_head(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores: tuple[torch.Tensor | None, ...]
            if micro_batch is None or micro_batch.head_fn is None:
                log_probs, entropy = linear_log_probs(
                    hidden, self.head(), targets, self.temperature, with_entropy=return_entropy
                )
                scores = (log_probs, entropy)
            else:
                micro_batch.head_output = micro_batch.head_fn(hidden, self.head(), targets)
                output = micro_batch.head_output
                scores = (output.log_probs, output.entropy, output.loss)
            return tuple(s for s in scores if s is not None)

        scores, output = self.at_rows(run_head, sequences, attention_mask, rows, images)
        of_all = partial(ring.gather_rows, rows=rows, attended=attended)
        log_probs = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, of_all(scores[0].float()))
        if return_entropy:
            output.entropy = torch.zeros_like(log_probs).masked_scatter(mask, of_all(scores[1].float()))
        if micro_batch is not None:
            micro_batch.entropy = output.entropy if micro_batch.required["entropy"] else None
            if micro_batch.head_fn is not None and micro_batch.head_output is not None:
                # The results as they left the model, with the hooks of all around it.
                entropy = scores[1] if return_entropy else None
                loss = ring.sum_of_losses(scores[-1])
                micro_batch.head_output = replace(
                    micro_batch.head_output, loss=loss, log_probs=scores[0], entropy=entropy
                )
        return (log_probs, output) if return_output else log_probs

    @property
    def ring(self) -> NoRing:
        """Which of a packed micro-batch's tokens are on this rank."""
        return current_ring()

    def at_rows(
        self,
        function: Callable[[torch.Tensor], Any],
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        images: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Any, Any]:
        """Run the model with `function(hidden [N, H])` for a head, on the N positions of `rows` (bool [B, S]).

        With ring attention, on those of them that are on this rank.

        Returns:
            The function's result and the model's output.
        """
        tokens, others, rows = model_inputs(self, sequences, attention_mask, rows, images)
        with self.tap.replaced_by(lambda hidden: function(hidden[rows])):
            output = self.model(tokens, **others)
        return output["logits"], output

    @torch.no_grad()
    def hidden_states(
        self,
        sequences: torch.Tensor,
        attention_mask: torch.Tensor,
        rows: torch.Tensor,
        max_tokens: int,
        wanted: torch.Tensor | None = None,
        images: Images | None = None,
    ) -> torch.Tensor:
        """Final hidden states [N, H] at the N positions of `rows`, without dropout and without a graph.

        In as many passes as it takes to read at most `max_tokens` (padding included) in one, on each rank of a ring.

        Args:
            sequences, attention_mask: int64 [B, S], right-padded. rows: bool [B, S].
            wanted: bool [N], those that this rank needs, wherever they are computed; None: all.
            images: of each of the B sequences; None: they have none.
        """
        lengths = attention_mask.sum(dim=1).tolist()
        batches = batches_within(lengths, max_tokens * self.ring.size)
        numbers = rows.sum(dim=1).tolist()
        needed = (rows[rows] if wanted is None else wanted).split(numbers)
        found: dict[int, torch.Tensor] = {}
        with self._scoring():
            for batch in batches:
                width = lengths[batch[0]]
                tokens, attended, at = (tensor[batch, :width] for tensor in (sequences, attention_mask, rows))
                inputs = None if images is None else merge_mm_train_inputs([images[i] for i in batch], rows.device)
                hidden, _ = self.at_rows(torch.clone, tokens, attended, at, inputs)
                own = [needed[i] for i in batch]
                hidden = self.ring.route(hidden, attended.bool(), at, torch.cat(own))
                found.update(zip(batch, hidden.split([int(n.sum()) for n in own]), strict=True))
            for _ in range(self._most_of_any_rank(len(batches)) - len(batches)):
                # Stands in: of a sample with an image all of it, for the other ranks gather the visual encoder, too.
                width = 2 if images is None else lengths[0]
                inputs = None if images is None else merge_mm_train_inputs(images[:1], rows.device)
                self.at_rows(
                    torch.clone, sequences[:1, :width], attention_mask[:1, :width], rows[:1, :width], inputs
                )
        return torch.cat([found[i] for i in range(len(lengths))])

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """The model without dropout, and with a trace of DeepSpeed's that is not the training's."""
        training = self.model.training
        self.model.eval()
        try:
            with trace_for_scoring(self.model):
                yield
        finally:
            self.model.train(training)

    def _most_of_any_rank(self, passes: int) -> int:
        """At ZeRO-3 the ranks gather weights together, so all of them must make as many passes."""
        if not any(map(is_partitioned, self.model.module.parameters())):
            return passes
        most = torch.tensor(passes, device=self.model.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def head(self) -> Head:
        """The LM head with what the model's configuration adds to it. Under ZeRO-3 use inside `gathered_head`."""
        module, config = self.tap.module, self.model.module.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return Head(module.weight, module.bias, scale, getattr(config, "final_logit_softcapping", None))

    @contextmanager
    def gathered_head(self) -> Iterator[Head]:
        """The head with its weights gathered from all ranks where ZeRO-3 keeps them apart."""
        with gathered(list(self.tap.module.parameters())):
            yield self.head()
