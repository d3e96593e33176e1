"""A plugin for test_turns.py: writes down every sequence that a teacher reads, and which of its tokens it scores."""

import json

from sdpo_plugin import hookimpl
from sdpo_plugin.algorithms.teacher import Teacher

out = None


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--reads.out", required=True)


@hookimpl
def openrlhf_worker_setup(worker):
    global out
    out = worker.args.reads.out


def noted(hidden_states):
    def call(self, sequences, attention_mask, rows, *others):
        with open(out, "a") as file:
            for ids, length, at in zip(sequences.tolist(), attention_mask.sum(dim=1).tolist(), rows, strict=True):
                scored = [position + 1 for position in at.nonzero()[:, 0].tolist()]
                file.write(json.dumps([ids[:length], scored]) + "\n")
        return hidden_states(self, sequences, attention_mask, rows, *others)

    return call


Teacher.hidden_states = noted(Teacher.hidden_states)
