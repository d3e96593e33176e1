"""Imports what every process of a run does. The test harness's fork server imports this once; each run is a fork."""

import os

# Ray reads these as soon as it is imported: a worker's job (a run has a cluster of its own, and this is what a new
# cluster calls its first job) and the process with which it ends.
RAY = {"RAY_JOB_ID": "01000000", "RAY_RAYLET_PID": str(os.getpid())}
os.environ.update(RAY)

from sdpo_plugin.host import cluster, cpu  # noqa: E402

os.environ["CUDA_VISIBLE_DEVICES"] = cluster.HIDDEN
cpu.enable()

from sdpo_plugin.host import controller, engine, worker  # noqa: E402, F401

for name in RAY:
    del os.environ[name]
