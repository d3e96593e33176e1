"""Run the installed OpenRLHF without CUDA: for trying, testing and developing, not for training at scale.

`enable()` changes one process, and `with_resources` has it called in every process of a run. What OpenRLHF and its
engines assume about CUDA is met at the place where it is assumed, and only once that module is imported:

| assumption                                          | met by                                                     |
| --------------------------------------------------- | ---------------------------------------------------------- |
| `flash_attn` is installed                           | a module of that name with the padding helpers of transformers |
| packed samples are attended to by flash attention   | sdpa: transformers sees in the position ids where one begins |
| `ring_flash_attn` is installed                      | a module of that name, by plain arithmetic (ring_attention.py) |
| `torch.cuda` has a current device, streams, a cache | functions that answer for the one device there is          |
| the device mesh is made of CUDA devices             | `init_device_mesh` on `cpu` (openrlhf.utils.deepspeed)     |
| weights reach vLLM through NCCL                     | a gloo group on both sides (openrlhf.utils.distributed_util) |
| vLLM keeps the weights it loaded                    | no packed copies of linear weights (vllm layers)           |
| an engine has a core to wait for its worker on      | both in one process (vllm.platforms.cpu)                   |
| C++ kernels are worth building                      | gloo and torch's AdamW (deepspeed): no compiler, no waiting |
"""

from __future__ import annotations

import importlib.machinery
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from wrapt import when_imported

from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.platform import cluster, ring_attention

# Read by vLLM's own child processes, which are not Ray workers and load no set-up hook (`vllm_general_plugin`).
ENABLED = "SDPO_PLUGIN_CPU"

CUDA_IS_HERE = "CPU mode was requested (--platform), but CUDA is available"

ENVIRONMENT = {
    ENABLED: "1",
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",  # one worker process per core already
    "RAY_prestart_worker_first_driver": "0",  # made-up CPUs must not each get a warm Python process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # the default, 15, is for machines with other work
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # its report runs a CPU detection of several seconds in every engine
}


# Of OpenRLHF's flags, where the usual default names a GPU's library.
DEFAULTS = {"ds.attn_implementation": "sdpa", "vllm.sync_backend": "gloo", "vllm.enforce_eager": True}


def enable() -> None:
    """Make the installed OpenRLHF importable and runnable in this process. Idempotent.

    Raises:
        RuntimeError: CUDA is available; nothing here may touch a GPU run.
    """
    import torch

    if torch.cuda.is_available():
        raise RuntimeError(
            f"{CUDA_IS_HERE}: {socket.gethostname()} has CUDA. Give --platform cuda; on one machine --platform cpu "
            "hides its GPUs, in a cluster it is for nodes without one"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "flash_attn" in sys.modules:
        return
    _stand_in_for_flash_attn()
    _answer_for_torch_cuda(torch)
    when_imported("openrlhf.utils")(_pack_for_sdpa)
    when_imported("deepspeed.comm.torch")(_plain_collectives)
    when_imported("deepspeed.ops.adam")(_plain_adam)
    when_imported("openrlhf.utils.deepspeed.deepspeed")(_mesh_on_cpu)
    when_imported("openrlhf.utils.distributed_util")(_sync_weights_through_gloo)
    when_imported("openrlhf.trainer.ray.vllm_worker_wrap")(_receive_weights_on_cpu)
    when_imported("vllm.model_executor.layers.utils")(_keep_loaded_weights)
    when_imported("vllm.platforms.cpu")(_engine_and_worker_in_one_process)
    when_imported("vllm.platforms.cpu")(_engines_may_sleep)


def vllm_general_plugin() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in each of its processes. Does nothing outside CPU mode."""
    if os.environ.get(ENABLED):
        enable()


def reject(args: Any) -> None:
    """Raises ConfigError where these (nested) arguments need what a CPU cannot do."""
    needs_gpu = {
        "--ds.load_in_4bit": args.ds.load_in_4bit,
        "--ds.use_liger_kernel": args.ds.use_liger_kernel,
        "--ds.tensor_parallel_size": args.ds.tensor_parallel_size > 1,
        "--vllm.tensor_parallel_size": args.vllm.tensor_parallel_size > 1,
        "--ds.attn_implementation": args.ds.attn_implementation not in ("sdpa", "eager"),
        "--vllm.sync_backend": args.vllm.sync_backend != "gloo",
    }
    for flag, asked in needs_gpu.items():
        if asked:
            raise ConfigError(f"{flag} as given needs a CUDA GPU, and this run is on CPU; leave it out")


def with_resources(init: Callable[..., Any]) -> Callable[..., Any]:
    """`ray.init` as OpenRLHF calls it, plus what a run on a machine without CUDA needs; no change elsewhere."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not os.environ.get(ENABLED):
            return init(*args, **kwargs)
        environment = dict(kwargs.get("runtime_env") or {})
        environment["worker_process_setup_hook"] = "sdpo_plugin.openrlhf_adapter.platform.cpu.enable"
        kwargs["runtime_env"] = environment
        if args or kwargs.get("address"):
            return init(*args, **kwargs)
        if cluster.joined() is not None:
            return init(*args, **kwargs)
        # Ray hands out one GPU and one CPU per model process; here both are only names for processes.
        gpus = cluster.MADE_UP_GPUS
        kwargs |= {"num_gpus": gpus, "num_cpus": gpus, "include_dashboard": False}
        try:
            return init(**kwargs)
        except Exception as error:
            # Ray gives its own helpers 15 s to start, which is too little on a busy machine once in a while.
            if "timed out during startup" not in str(error):
                raise
            return init(**kwargs)

    return call


class _Device(str):
    """The device `torch.cuda.current_device()` names here: `cpu`, and index 0 where OpenRLHF writes `cuda:{...}`."""

    def __format__(self, spec: str) -> str:
        return "0"


def _answer_for_torch_cuda(torch: Any) -> None:
    for name in ("synchronize", "empty_cache", "set_device", "current_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: _Device("cpu")


def _stand_in_for_flash_attn() -> None:
    def module(name: str, **members: Any) -> None:
        stand_in = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        stand_in.__path__ = []
        vars(stand_in).update(members)
        sys.modules[name] = stand_in

    def padding(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            import transformers.modeling_flash_attention_utils as helpers

            return getattr(helpers, f"_{name}")(*args, **kwargs)

        return call

    def rearrange(*args: Any, **kwargs: Any) -> Any:
        import einops

        return einops.rearrange(*args, **kwargs)

    module("flash_attn", __version__="0")
    module("flash_attn.bert_padding", rearrange=rearrange,
           index_first_axis=lambda tensor, indices: tensor[indices],
           **{name: padding(name) for name in ("unpad_input", "pad_input")})
    module("flash_attn.utils")
    module("flash_attn.utils.distributed", all_gather=ring_attention.all_gather)
    module("ring_flash_attn", update_ring_flash_attn_params=ring_attention.update_ring_flash_attn_params,
           substitute_hf_flash_attn=ring_attention.substitute_hf_flash_attn)


def _pack_for_sdpa(module: Any) -> None:
    get_strategy = module.get_strategy

    def get_strategy_for_cpu(args: Any) -> Any:
        if "flash_attention" in args.ds.attn_implementation:  # the launcher sets it for --ds.packing_samples
            args.ds.attn_implementation = DEFAULTS["ds.attn_implementation"]
        return get_strategy(args)

    module.get_strategy = get_strategy_for_cpu


def _plain_collectives(module: Any) -> None:
    module.build_shm_op = lambda: None  # what DeepSpeed itself does where the operator cannot be built


def _plain_adam(module: Any) -> None:
    import torch

    class Adam(torch.optim.AdamW):
        """The same update without a kernel: DeepSpeed builds one per machine, and a killed build blocks the next."""

        def __init__(self, params: Any, **settings: Any) -> None:
            for of_the_kernels in ("adam_w_mode", "adamw_mode", "fp32_optimizer_states"):
                settings.pop(of_the_kernels, None)
            super().__init__(params, fused=True, **settings)  # else with temporaries as large as the model

    module.FusedAdam = module.DeepSpeedCPUAdam = module.fused_adam.FusedAdam = Adam


def _mesh_on_cpu(module: Any) -> None:
    init_device_mesh = module.init_device_mesh
    module.init_device_mesh = lambda device, *args, **kwargs: init_device_mesh("cpu", *args, **kwargs)


class _GlooGroup:
    """What OpenRLHF uses of vLLM's `PyNcclCommunicator`: a blocking broadcast between trainer and engines."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from torch import distributed

        store = distributed.TCPStore(host, port, world_size, is_master=rank == 0)
        gloo: Any = distributed.ProcessGroupGloo  # torch's stub lacks most of it
        self.group = gloo(store, rank, world_size)
        self.broadcasts = 0

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        self.broadcasts += 1
        self.group.broadcast(tensor, src).wait()


def _sync_weights_through_gloo(module: Any) -> None:
    def stateless_init_process_group(master_address, master_port, rank, world_size, device):
        return _GlooGroup(master_address, master_port, rank, world_size)

    module.stateless_init_process_group = stateless_init_process_group


def _receive_weights_on_cpu(module: Any) -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    class CudaMeansCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return func(*args, **kwargs)

    update_weight = module.WorkerWrap.update_weight

    def update_weight_on_cpu(self, name, dtype, shape, *rest):
        group = self._model_update_group
        before = group.broadcasts
        try:
            with CudaMeansCpu():
                return update_weight(self, name, dtype, shape, *rest)
        finally:
            if group.broadcasts == before:  # rejected at once: the trainer waits here, and gets the error afterwards
                group.broadcast(torch.empty(shape, dtype=dtype), src=0)

    module.WorkerWrap.update_weight = update_weight_on_cpu


def _keep_loaded_weights(module: Any) -> None:
    import torch

    # vLLM packs each linear weight for its GEMM and drops the parameter, so a later update has nothing to load into.
    def plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    module.dispatch_cpu_unquantized_gemm = plain_linear


def _engine_and_worker_in_one_process(module: Any) -> None:
    check = module.CpuPlatform.check_and_update_config.__func__

    # vLLM gives the worker a process of its own, so that it can bind threads to cores; here it has one thread. The
    # engine then waits for the worker by spinning on a core.
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        parallel = vllm_config.parallel_config
        asked = parallel.distributed_executor_backend
        check(cls, vllm_config)
        parallel.distributed_executor_backend = asked

    module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _engines_may_sleep(module: Any) -> None:
    module.CpuPlatform.is_sleep_mode_available = lambda self: True  # its worker does nothing and logs that
