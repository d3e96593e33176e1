"""A plugin for test_teacher.py: notes whether the teacher's weights are somewhere else while they are read."""

from sdpo_plugin import hookimpl, plugins


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--residence.out", required=True)


def places(module):
    return {name: p.data_ptr() for name, p in module.named_parameters()}


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    module = plugins.algorithm().teacher.model.actor.model.module
    kept = places(module)

    def note(*_):
        away = sum(place != kept[name] for name, place in places(module).items())
        with open(f"{worker.args.residence.out}.{worker.rank}", "a") as file:
            file.write(f"{away} of {len(kept)}\n")

    module.register_forward_pre_hook(note)
