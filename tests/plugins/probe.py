"""A plugin for test_gradients.py: step 1 with the fused loss, step 2 with the dense definition, each written down.

The learning rate is 0 and both steps train on the same samples, so their gradients should be one gradient.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wrapt import when_imported

import sdpo_plugin.algorithms.distillation_pass
import sdpo_plugin.distillation.fused
from sdpo_plugin import hookimpl, plugins
from sdpo_plugin.distillation.fused import HeadOutput
from sdpo_plugin.distillation.loss import TokenBatch, log_probs

CHUNK_ROWS = 16


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--probe.out", required=True)
    parser.add_argument("--probe.fp32", action="store_true", help="train in float32, which the host does not offer")
    parser.add_argument("--probe.bucket", type=int, help="elements of a gradient bucket of DeepSpeed")


@hookimpl
def openrlhf_configure(args):
    if args.probe.fp32:
        args.ds.param_dtype = "fp32"


@when_imported("openrlhf.utils.utils")
def know_fp32(module):
    convert = module.convert_to_torch_dtype
    module.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else convert(name)


@hookimpl
def openrlhf_model_built(actor, args):
    if args.probe.fp32:
        assert next(actor.model.parameters()).dtype == torch.float32
    if args.probe.bucket is not None:
        from openrlhf.utils.deepspeed import deepspeed

        configure = deepspeed.get_train_ds_config

        def with_bucket(*settings, **named):
            config = configure(*settings, **named)
            config["zero_optimization"]["reduce_bucket_size"] = args.probe.bucket
            return config

        deepspeed.get_train_ds_config = with_bucket


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    sdpo_plugin.distillation.fused.rows_at_a_time = lambda device, row_bytes: (CHUNK_ROWS, 4)
    engine, trainer = worker.actor.model, worker.trainer
    worker.logits, worker.gradients = LogitRows(engine.module.config), []
    worker.read = []  # samples per micro-batch of the student

    def count_samples(module, args):
        if module.training:  # a teacher may be the same module
            worker.read.append(len(args[0]))

    engine.module.register_forward_pre_hook(count_samples)
    worker.teacher_read = []  # tokens per pass, padding included
    teacher = plugins.algorithm().teacher.model.actor
    if worker.args.ds.lora.rank == 0:  # else it is the student's module
        teacher.model.module.register_forward_pre_hook(lambda module, args: worker.teacher_read.append(args[0].numel()))
    step, training_step, ppo_train = engine.step, trainer.training_step, trainer.ppo_train
    worker.actor.forward = worker.logits.traced(worker.actor.forward)  # the pass for old log-probabilities too

    def step_with_gradients():
        if engine.is_gradient_accumulation_boundary():
            from deepspeed.utils import safe_get_full_grad

            trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
            worker.gradients.append({name: safe_get_full_grad(p).float().cpu().clone() for name, p in trained})
        return step()

    def training_step_with_logits(*args, **kwargs):
        status = worker.logits.traced(training_step)(*args, **kwargs)
        status["metrics"]["probe/logit_rows"] = float(worker.logits.largest)
        status["weights"]["probe/logit_rows"] = "sample"
        return status

    def ppo_train_in_order(*args, **kwargs):
        torch.manual_seed(0)  # the same micro-batches in both steps: bf16 sums depend on their order
        return ppo_train(*args, **kwargs)

    if worker.args.probe.fp32:
        trainer.broadcast_to_vllm = lambda: None  # of a model in bf16

    engine.step, trainer.training_step = step_with_gradients, training_step_with_logits
    trainer.ppo_train = ppo_train_in_order


@hookimpl
def openrlhf_optimizer_step(worker):
    sdpo_plugin.algorithms.distillation_pass.linear_distillation = dense
    torch.save(worker.read, f"{worker.args.probe.out}.read{worker.rank}")
    torch.save(worker.teacher_read, f"{worker.args.probe.out}.teacher{worker.rank}")
    if worker.rank == 0:
        torch.save(worker.gradients, worker.args.probe.out)


class LogitRows(TorchDispatchMode):
    """The most rows any tensor with a vocabulary dimension at its end has had."""

    def __init__(self, config):
        super().__init__()
        self.vocab, self.hidden, self.largest = config.vocab_size, config.hidden_size, 0

    def traced(self, function):
        def call(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            logits = isinstance(leaf, torch.Tensor) and leaf.ndim > 1 and leaf.shape[-1] == self.vocab
            if logits and leaf.shape[-2] != self.hidden:  # not the head's own weight, transposed
                self.largest = max(self.largest, leaf.numel() // self.vocab)
        return result


def dense(hidden, head, teachers, token_ids, weights, objective, data, temperature, **kwargs):
    """`linear_distillation` as it is defined: all logits at once, autograd."""
    student = log_probs(hidden.float() @ head.weight.float().T / temperature)
    taught = [log_probs(t.hidden.float() @ t.head.weight.detach().float().T / temperature) for t in teachers]
    tokens = TokenBatch(student, taught, token_ids, torch.arange(len(token_ids)), data)
    loss = objective(tokens)
    chosen = tokens.log_probs if kwargs["differentiable_log_probs"] else tokens.log_probs.detach()
    return HeadOutput((loss * weights).sum(), loss.detach(), chosen, None)
