"""A plugin for test_gradients.py: writes down a worker's first gradient and the largest logits it ever made."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdpo_plugin.fused
import sdpo_plugin.plugin
from sdpo_plugin.fused import Scores
from sdpo_plugin.host.hookspecs import hookimpl
from sdpo_plugin.loss import per_token_loss

CHUNK_ROWS = 16


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--probe.out", required=True)
    parser.add_argument("--probe.dense", action="store_true")


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    from deepspeed.utils import safe_get_full_grad

    engine = worker.actor.model
    rows = LogitRows(engine.module.config)
    sdpo_plugin.fused._rows_at_a_time = lambda device, row_bytes: (CHUNK_ROWS, 4)
    if worker.args.probe.dense:
        sdpo_plugin.plugin.linear_distillation = dense
    step, training_step, forward = engine.step, worker.trainer.training_step, worker.actor.forward
    seen = {}

    def step_with_probe():
        if not seen:
            seen.update({n: safe_get_full_grad(p).float().cpu() for n, p in engine.module.named_parameters()})
            if worker.rank == 0:
                torch.save(seen, worker.args.probe.out)
        return step()

    def traced(function):
        def call(*args, **kwargs):
            with rows:
                return function(*args, **kwargs)

        return call

    def training_step_with_report(*args, **kwargs):
        status = traced(training_step)(*args, **kwargs)
        status["metrics"]["probe/logit_rows"] = float(rows.largest)
        status["weights"]["probe/logit_rows"] = "sample"
        return status

    engine.step, worker.trainer.training_step = step_with_probe, training_step_with_report
    worker.actor.forward = traced(forward)  # the pass for old log-probabilities is outside the training step


class LogitRows(TorchDispatchMode):
    """The most rows any tensor with a vocabulary dimension at its end has had."""

    def __init__(self, config):
        super().__init__()
        self.vocab, self.hidden, self.largest = config.vocab_size, config.hidden_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            logits = isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == self.vocab
            if logits and leaf.shape[-2] != self.hidden:  # not the head's own weight, transposed
                self.largest = max(self.largest, leaf.numel() // self.vocab)
        return result


def dense(hidden, head, teacher_hidden, teacher_head, token_ids, weights, config, old, temperature, **kwargs):
    """`linear_distillation` as it is defined: all logits at once, autograd."""
    student = hidden.float() @ head.weight.float().T / temperature
    teacher = teacher_hidden.float() @ teacher_head.weight.detach().float().T / temperature
    loss = per_token_loss(student, teacher, token_ids, config, old)
    log_probs = student.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]
    return Scores((loss * weights).sum(), loss.detach(), log_probs.detach(), None)
