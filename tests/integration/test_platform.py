"""Which machine is it? A driver without a GPU in front of Ray clusters that have some, by name."""

import tempfile

import pytest
from common import ROWS, SDPO, TWO_RANKS

from sdpo_plugin.testing import RunFailed

# What a node does whose torch sees a GPU.
LIES = """
from wrapt import when_imported

@when_imported("torch.cuda")
def lie(module):
    module.is_available = lambda: True
"""


@pytest.fixture
def cluster(request, monkeypatch, tmp_path):
    """Two nodes with two GPUs each, which are names; with the parameter "lies" their torch sees CUDA, too."""
    from ray.cluster_utils import Cluster

    # Ray writes down which cluster runs on this machine. Runs of other tests are not to join it.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # it holds sockets
        monkeypatch.setenv("RAY_TMPDIR", short)
        with monkeypatch.context() as environment:
            if getattr(request, "param", None) == "lies":
                (tmp_path / "sitecustomize.py").write_text(LIES)
                environment.setenv("PYTHONPATH", str(tmp_path))
            made = Cluster(initialize_head=True, head_node_args={"num_gpus": 2, "num_cpus": 8})
            made.add_node(num_gpus=2, num_cpus=8)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


@pytest.mark.check
def test_auto_is_never_a_cpu_where_the_cluster_has_gpus(openrlhf, model, reward, cluster):
    with pytest.raises(RunFailed) as failed:
        openrlhf(model, ROWS, reward, *SDPO, "--platform", "auto", fresh=True)
    said = f"no CUDA here, but the Ray cluster at {cluster.address} has 4 GPUs, so OpenRLHF runs on those"
    assert said in failed.value.output and "running OpenRLHF on CPU" not in failed.value.output
    assert "imported on this machine, where the run is started (No module named 'flash_attn')" in str(failed.value)
    assert failed.value.code == 2 and failed.value.seconds < 60


@pytest.mark.check
def test_a_run_on_two_nodes(openrlhf, model, reward, cluster):
    """The policy's two ranks and the engine do not fit on one."""
    run = openrlhf(model, ROWS, reward, *SDPO, *TWO_RANKS)
    assert len(run.metrics["train/policy_loss"]) == 1
    with pytest.raises(RunFailed, match=r"needs 5 GPUs \(actor 4, vllm 1\), and the Ray cluster at .* has 4"):
        openrlhf(model, ROWS, reward, *SDPO, "--actor.num_gpus_per_node", "4")


@pytest.mark.check
@pytest.mark.parametrize("cluster", ["lies"], indirect=True)
def test_a_worker_that_finds_cuda_is_not_put_into_cpu_mode(openrlhf, model, reward, cluster):
    with pytest.raises(RunFailed) as failed:
        openrlhf(model, ROWS, reward, *SDPO, fresh=True, timeout=120)
    last = failed.value.output.rstrip().splitlines()[-3:]
    assert "CPU mode was requested (--platform), but CUDA is available: " in "".join(last)
    assert failed.value.code == 2
