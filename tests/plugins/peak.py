"""A plugin for slow/memory.py: how much memory a policy worker takes beyond what it had before it had a model."""

import gc
import json
import resource
import threading
import time

import psutil

from sdpo_plugin import hookimpl

BEFORE = psutil.Process().memory_info().rss  # imported before the model is built
MIB = 2**20


@hookimpl
def openrlhf_add_arguments(parser):
    parser.add_argument("--peak.out", required=True)


class Sampler(threading.Thread):
    """The peak since `begin`, looked at every 5 ms: a process cannot reset its own."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self):
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            time.sleep(0.005)


@hookimpl(trylast=True)
def openrlhf_worker_setup(worker):
    gc.collect()
    worker.found = {"set up": psutil.Process().memory_info().rss - BEFORE}
    worker.sampler = Sampler()
    worker.sampler.start()


@hookimpl(trylast=True)
def openrlhf_optimizer_step(worker):
    worker.found["between steps"] = psutil.Process().memory_info().rss - BEFORE
    worker.found["peak"] = worker.sampler.peak - BEFORE
    worker.found["peak with start-up"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - BEFORE
    with open(f"{worker.args.peak.out}.{worker.rank}", "w") as file:
        json.dump(worker.found, file)
