"""A policy worker without OpenRLHF, for units: what an algorithm sees, in milliseconds."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdpo_plugin.interface.micro_batch import MicroBatch


# Long: one closure over the sizes and options, whose classes are a model and its worker.
def fake_worker(vocab: int = 31, hidden: int = 16, device: Any = None, **groups: dict[str, Any]) -> Any:
    """A policy worker on one rank with a toy model, for units: what a plugin sees, in milliseconds.

    Args:
        device: of the model and of every micro-batch; torch's default device if not given.
        groups: options that differ from their defaults, `fake_worker(distill={"alpha": 1.0}, actor={...})`.

    Returns:
        A `Worker` with `micro_batch(plugin, sequences, attention_mask, action_mask, **data)`: a `MicroBatch`
        after `openrlhf_before_forward`, the student's forward pass and `openrlhf_policy_loss`; `data` is what a plugin
        attached on the controller. OpenRLHF's policy loss is the mean over tokens of -advantage * log_prob here; the
        advantages are 1 if not given. `reports` has what plugins reported (`MicroBatch.report`).
    """
    import copy

    import torch
    from torch.utils._pytree import tree_map_only

    from sdpo_plugin.config import GROUPS
    from sdpo_plugin.distillation.head import Head
    from sdpo_plugin.interface.micro_batch import MicroBatch, combined_requirements
    from sdpo_plugin.interface.models import Fragment
    from sdpo_plugin.interface.transport import ATTACHED, Reports, response_rows

    device = torch.get_default_device() if device is None else device

    class Actor(torch.nn.Module):
        temperature = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(vocab, hidden)
            self.mix = torch.nn.Linear(hidden, hidden)
            self.lm_head = torch.nn.Linear(hidden, vocab, bias=False)

        def states(self, sequences: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(1, sequences.shape[1] + 1, device=sequences.device)[:, None]
            return torch.tanh(self.mix(self.embedding(sequences).cumsum(1) / positions.sqrt()))

        @torch.no_grad()
        def hidden_states(self, sequences: Any, attention_mask: Any, rows: Any, *others: Any) -> Any:
            _, wanted, _ = others  # all in one pass, and no images
            return self.states(sequences)[rows][wanted]

        @contextlib.contextmanager
        def gathered_head(self) -> Any:
            yield Head(self.lm_head.weight)

        def tap_head(self) -> None:
            pass

        def weight_shards(self) -> dict[str, torch.Tensor]:
            return {name: p.data.view(-1) for name, p in self.named_parameters()}

        def sync(self) -> None:
            pass

    class Worker:
        rank, ranks = 0, 1

        def __init__(self) -> None:
            defaults = {g.prefix: vars(g()) for g in GROUPS} | {
                "actor": {"entropy_coef": None, "aux_loss_coef": 0.0},
                "algo": {
                    "name": "sdpo", "kl": SimpleNamespace(use_loss=False, init_coef=0.0),
                    "advantage": SimpleNamespace(is_correction_level="off"),
                },
                "rollout": {"batch_size": 2, "n_samples_per_prompt": 2},
                "train": {"batch_size": 4, "max_epochs": 1, "async_enable": False},
                "data": {"apply_chat_template": True, "input_key": "prompt", "chat_template_kwargs": "{}"},
                "reward": {"remote_url": ["reward.py"]},
            }  # fmt: skip
            self.args = SimpleNamespace(**{
                name: SimpleNamespace(**{**defaults.get(name, {}), **groups.get(name, {})})
                for name in {**defaults, **groups}
            })  # fmt: skip
            torch.manual_seed(0)
            self.actor, self.master_weights = Actor().to(device), self
            self.reports: Reports = {}

        def fragments(self) -> dict[str, Any]:
            return {name: Fragment(0, p.data.view(-1)) for name, p in self.actor.named_parameters()}

        @property
        def layout(self) -> list[list[tuple[str, int, int]]]:
            mine = [(name, fragment.start, len(fragment.values)) for name, fragment in self.fragments().items()]
            return [mine] * self.ranks

        def load_initial_model(self, offload: bool, updatable: bool) -> Actor:
            return copy.deepcopy(self.actor)

        def micro_batch(
            self, plugin: Any, sequences: Any, attention_mask: Any, action_mask: Any, advantages: Any = None,
            old_log_probs: Any = None, rollout_log_probs: Any = None, **data: list[Any],
        ) -> MicroBatch:  # fmt: skip
            advantages = torch.ones(action_mask.shape) if advantages is None else advantages
            experience = SimpleNamespace(
                sequences=sequences, attention_mask=attention_mask, action_mask=action_mask, advantages=advantages,
                action_log_probs=old_log_probs, rollout_log_probs=rollout_log_probs,
                info={ATTACHED + name: values for name, values in data.items()},
            )  # fmt: skip
            vars(experience).update(tree_map_only(torch.Tensor, lambda x: x.to(device), vars(experience)))
            sequences, action_mask, advantages = experience.sequences, experience.action_mask, experience.advantages
            worker: Any = self
            micro_batch = MicroBatch(
                worker,
                experience,
                combined_requirements([plugin.openrlhf_requirements(self.args)]),
                lambda loss, mask: (loss * mask).sum() / mask.sum().clamp(min=1),
                lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean(),
                lambda old, rollout, mask: (old - rollout).exp().clamp(max=2.0) * mask,
                self.reports,
            )
            plugin.openrlhf_before_forward(micro_batch)
            rows = response_rows(micro_batch.response, sequences)
            states, targets = self.actor.states(sequences)[rows], torch.roll(sequences, -1, dims=1)[rows]
            assert micro_batch.head_fn is not None
            with self.actor.gathered_head() as head:
                micro_batch.head_output = micro_batch.head_fn(states, head, targets)
            log_probs = torch.zeros(action_mask.shape, device=states.device)
            log_probs = log_probs.masked_scatter(micro_batch.response, micro_batch.head_output.log_probs)
            log_probs, advantages = micro_batch.policy_loss_inputs(log_probs, advantages)
            micro_batch.log_probs = log_probs
            micro_batch.loss = -(advantages * log_probs)[action_mask.bool()].mean()
            plugin.openrlhf_policy_loss(micro_batch)
            return micro_batch

    return Worker()
