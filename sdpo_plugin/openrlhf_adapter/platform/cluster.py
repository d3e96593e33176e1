"""The machines a run gets: the Ray cluster that it joins or starts, CUDA's or a CPU's, and whether they are enough.

Whether OpenRLHF runs on CPU is a matter of the workers. A driver without a GPU in front of a cluster that has some (a
login node, the head of a KubeRay cluster) decides nothing.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sdpo_plugin.config import ConfigError, TeacherConfig, from_namespace, is_server

PLATFORMS = ("auto", "cuda", "cpu")
VARIABLE = "OPENRLHF_PLATFORM"  # where there is no `--platform`
MADE_UP_GPUS = 64  # of a cluster that CPU mode starts: names for processes
CONNECT_S = 5.0
# Names of GPUs that no machine has. CUDA then shows none, and Ray, which counts them, does not object.
HIDDEN = ",".join(str(1000 + i) for i in range(MADE_UP_GPUS))


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that runs already.

    Attributes:
        address: host:port of its GCS. nodes: how many are alive. gpus: all of them together, real or declared.
    """

    address: str
    nodes: int
    gpus: int


def joined() -> Cluster | None:
    """The cluster that `ray.init()` will join, by `RAY_ADDRESS` or `ray start` on this machine; None: it starts one.

    Raises:
        ConfigError: nothing answers there.
    """
    from ray._private.services import canonicalize_bootstrap_address

    named = os.environ.get("RAY_ADDRESS")
    if named and named.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS {named}: OpenRLHF's launcher is a driver on the cluster and cannot be a Ray client; use ray "
            "job submit, or unset it on a node of the cluster"
        )
    try:
        address = canonicalize_bootstrap_address(None)
    except Exception as error:
        raise ConfigError(f"RAY_ADDRESS {named}: {error}; give host:port, or unset it") from error
    if address is None:
        return None
    at = urlsplit(f"//{address}")
    try:
        socket.create_connection((at.hostname, at.port or 0), timeout=CONNECT_S).close()
    except OSError as error:
        where = f"RAY_ADDRESS {named}" if named else f"the Ray cluster that was started on this machine, {address}"
        fix = "unset RAY_ADDRESS to start one here" if named else "ray stop forgets it"
        raise ConfigError(f"{where}: nothing answers there ({error}); start it with ray start, or {fix}") from error
    from ray._raylet import GcsClient

    known = GcsClient(address=address).get_all_node_info(timeout=CONNECT_S).values()
    alive = [node for node in known if not node.state]
    return Cluster(address, len(alive), int(sum(dict(node.resources_total).get("GPU", 0) for node in alive)))


def on_cpu(platform: str | None, cluster: Cluster | None) -> bool:
    """Whether the run is one without CUDA: `--platform`, else `OPENRLHF_PLATFORM`, else what is there.

    With `cpu` the GPUs of this machine are hidden from this process and all that it starts.

    Raises:
        ConfigError: an unknown platform, or one that is not there.
    """
    import torch

    platform = platform or os.environ.get(VARIABLE) or "auto"
    if platform not in PLATFORMS:
        raise ConfigError(f"--platform {platform}: choose one of {', '.join(PLATFORMS)}")
    if platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = HIDDEN
        return True
    if torch.cuda.is_available():
        return False
    if cluster is not None and (cluster.gpus or platform == "cuda"):
        print(
            f"openrlhf-sdpo: no CUDA here, but the Ray cluster at {cluster.address} has {cluster.gpus} GPUs, so "
            "OpenRLHF runs on those; if they are only names, give --platform cpu"
        )
        return False
    if platform == "cuda":
        raise ConfigError(
            "--platform cuda: this machine has no CUDA GPU, and no Ray cluster is there to join; give --platform cpu, "
            "or RAY_ADDRESS"
        )
    return True


def gpus_needed(args: Any) -> dict[str, int]:
    """By what OpenRLHF's launcher makes placement groups and actors for, what each takes of Ray's GPUs."""
    train = args.train
    actor = args.actor.num_nodes * args.actor.num_gpus_per_node
    found = {"actor": actor}
    shared = train.colocate_all or train.colocate_actor_ref
    if args.algo.kl.init_coef > 0 and not shared:
        found["ref"] = args.ref.num_nodes * args.ref.num_gpus_per_node
    if not (train.colocate_all and not train.async_enable):
        found["vllm"] = (args.vllm.num_engines or 0) * args.vllm.tensor_parallel_size
    if args.algo.name is not None and not (train.colocate_all and not train.async_enable):
        found["teacher"] = own_engines(args) * args.teacher.tensor_parallel_size
    critic = args.critic.num_nodes * args.critic.num_gpus_per_node if args.critic.model_name_or_path else 0
    reward = args.reward.num_nodes * args.reward.num_gpus_per_node if not args.reward.remote_url else 0
    if not train.colocate_all:
        found["critic"] = critic
        found["reward"] = 0 if critic and train.colocate_critic_reward else reward
    elif critic and train.colocate_critic_reward:
        found["critic"] = critic
    return {name: count for name, count in found.items() if count}


def own_engines(args: Any) -> int:
    """How many vLLM engines the run starts for the teacher."""
    config: TeacherConfig = from_namespace(TeacherConfig, args)
    if config.scored_by == "worker" or config.kind == "live":
        return 0
    return config.num_engines * sum(not is_server(source) for source in config.sources("").values())


def require_gpus(args: Any, cluster: Cluster | None, cpu: bool) -> None:
    """Raise ConfigError where Ray would wait for GPUs that will never come, which it does in silence."""
    import torch

    if cluster is not None:
        have, where = cluster.gpus, f"the Ray cluster at {cluster.address}"
        more = " (--platform cpu needs them by name only: ray start --num-gpus)" if cpu else ""
    else:
        have, where, more = MADE_UP_GPUS if cpu else torch.cuda.device_count(), "this machine", ""
    needed = gpus_needed(args)
    if (total := sum(needed.values())) > have:
        listed = ", ".join(f"{name} {count}" for name, count in needed.items())
        raise ConfigError(
            f"--actor.num_gpus_per_node {args.actor.num_gpus_per_node}: the run needs {total} GPUs ({listed}), and "
            f"{where} has {have}{more}; give fewer, or share them with --train.colocate_all"
        )
