"""Imports what every process of a run does. The test harness's fork server imports this once; each run is a fork."""

import gc
import importlib
import os

# Ray reads these as soon as it is imported: a worker's job (a run has a cluster of its own, and this is what a new
# cluster calls its first job), the process with which it ends, and how Ray's helpers see that theirs has ended (by a
# pipe: it is not their parent, which is the nursery).
RAY = {
    "RAY_JOB_ID": "01000000",
    "RAY_RAYLET_PID": str(os.getpid()),
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
}
os.environ.update(RAY)

from sdpo_plugin.openrlhf_adapter.platform import cluster, cpu  # noqa: E402

os.environ["CUDA_VISIBLE_DEVICES"] = cluster.HIDDEN
cpu.enable()

MODULES = (
    # the launcher, the controller and the policy workers
    "sdpo_plugin.openrlhf_adapter.controller.controller", "sdpo_plugin.openrlhf_adapter.engine.engine",
    "sdpo_plugin.openrlhf_adapter.worker.worker", "sdpo_plugin.openrlhf_adapter.launcher.cli",
    "sdpo_plugin.openrlhf_adapter.launcher.install", "sdpo_plugin.openrlhf_adapter.launcher.preflight",
    "sdpo_plugin.plugin", "sdpo_plugin.monitoring.loggers", "sdpo_plugin.algorithms.compatibility",
    "tensorboard.summary", "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    # the engine's actor and its core
    "vllm.v1.engine.async_llm", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor",
    "vllm.v1.structured_output", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama",
    "openrlhf.trainer.ray.vllm_worker_wrap",
    # Ray's own
    "ray._private.log_monitor", "ray._private.runtime_env.agent.runtime_env_agent",
    "ray._private.workers.default_worker",
    "ray.autoscaler._private.monitor", "ray.dashboard.agent", "ray.dashboard.dashboard",
    "ray.dashboard.modules.reporter.reporter_agent", "ray.dashboard.modules.usage_stats.usage_stats_head",
)  # fmt: skip
for name in MODULES:
    importlib.import_module(name)

for name in RAY:
    del os.environ[name]
gc.collect()
gc.freeze()  # else every fork's collector walks over all this, and so copies it
