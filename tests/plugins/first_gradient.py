"""A plugin for test_teacher_engines.py: writes down the first optimizer step's gradient."""

import torch

from sdpo_plugin import hookimpl


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--gradient.out", required=True)


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    engine, trainer = worker.actor.model, worker.trainer
    step, ppo_train = engine.step, trainer.ppo_train

    def step_with_gradient():
        if engine.is_gradient_accumulation_boundary() and not hasattr(worker, "gradient"):
            from deepspeed.utils import safe_get_full_grad

            trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
            worker.gradient = {name: safe_get_full_grad(p).float().cpu().clone() for name, p in trained}
            if worker.rank == 0:
                torch.save(worker.gradient, worker.args.gradient.out)
        return step()

    def ppo_train_in_order(*args, **kwargs):
        torch.manual_seed(0)  # the same micro-batches in all runs: bf16 sums depend on their order
        return ppo_train(*args, **kwargs)

    engine.step, trainer.ppo_train = step_with_gradient, ppo_train_in_order
