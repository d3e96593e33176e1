"""Every PPO script of OpenRLHF's examples with `--algo sdpo`; data/openrlhf_scripts.json has their flags at 3c3be62.

Changed are models, data, files and sizes, what a CPU lacks, and flags that have other names in OpenRLHF 0.11.2.
"""

import json
from pathlib import Path

import pytest
from common import REWARD, ROWS

from sdpo_plugin.testing import tiny_model, tiny_vision_model

SCRIPTS = json.loads((Path(__file__).parents[1] / "data" / "openrlhf_scripts.json").read_text())
RENAMED = {
    "--algo.advantage.is_correction_enable": "",
    "--algo.advantage.is_correction_type icepop": "--algo.advantage.is_correction_mode mask",
}
LEFT_OUT = ("--logger.wandb.key", "--ckpt.load_enable", "--eval.dataset", "--ckpt.output_dir", "--ckpt.path",
            "--logger.tensorboard_dir")  # fmt: skip
SMALL = (
    "--data.max_len 128 --rollout.max_new_tokens 8 --rollout.batch_size 4 --train.batch_size 8 "
    "--rollout.n_samples_per_prompt 2 --train.micro_batch_size 2 --rollout.micro_batch_size 2 --data.max_samples 64 "
    "--train.num_episodes 1 --train.max_tokens_per_gpu 256 --rollout.max_tokens_per_gpu 256 --eval.steps -1 "
    "--ref.num_gpus_per_node 2 --actor.num_gpus_per_node 2 --vllm.num_engines 2 --vllm.gpu_memory_utilization 0.1 "
    "--data.input_key prompt --data.label_key label --reprompt.success_threshold -1000"
).split()
ON_CPU = "--vllm.tensor_parallel_size 1 --vllm.sync_backend gloo --ds.attn_implementation sdpa".split()
AGENT = '''
import random
import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

class Agent(AgentInstanceBase):
    """As examples/python/agent_func.py: some turns, whose feedback is mark-up, and a reward by chance."""
    def __init__(self, *args, **kwargs):
        self.turn, self.turns = 0, random.randint(1, 3)

    async def reset(self, states, **kwargs):
        return {"observation": states["observation"]}

    async def step(self, states, **kwargs):
        done = self.turn >= self.turns
        self.turn += 1
        reward = torch.randint(0, 2, (1,)).float() if done else torch.tensor(0)
        return {"rewards": reward, "scores": reward, "done": done, "extra_logs": {"dummy_scores": reward},
                "environment_feedback": "[CORRECT]</s>" if done else "[INCORRECT] try again</s>",
                "sampling_params": states.get("sampling_params", None)}

class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(Agent)
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from PIL import Image

    directory = tmp_path_factory.mktemp("scripts")
    (directory / "agent.py").write_text(AGENT)
    (directory / "reward.py").write_text(REWARD)
    Image.new("RGB", (56, 56), (255, 0, 0)).save(directory / "red.png")
    content = [{"type": "image"}, {"type": "text", "text": "say 1"}]
    pictured = {"prompt": [{"role": "user", "content": content}], "images": [str(directory / "red.png")], "label": "1"}
    (directory / "rows.jsonl").write_text(4 * "".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "pictured.jsonl").write_text(8 * (json.dumps(pictured) + "\n"))
    (directory / "pictured.py").write_text(REWARD.replace('    assert type', '    # assert type'))
    tiny_model(directory / "model")
    tiny_vision_model(directory / "vision")
    return directory


@pytest.mark.check
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_with_sdpo(openrlhf, files, name):
    pictures = "vlm" in name
    changed = {
        "--actor.model_name_or_path": files / ("vision" if pictures else "model"),
        "--data.prompt_dataset": files / ("pictured.jsonl" if pictures else "rows.jsonl"),
        "--reward.model_name_or_path": files / "model",
        "--reward.remote_url": files / ("pictured.py" if pictures else "reward.py"),
        "--train.agent_func_path": files / "agent.py",
    }
    given = []
    for line in SCRIPTS[name]:
        flag = line.split()[0]
        if flag not in LEFT_OUT:
            given += [flag, str(changed[flag])] if flag in changed else RENAMED.get(line, line).split()
    # With two ranks at ZeRO-3 a visual encoder's weights are not always finite on a CPU, without `--algo` as well; and
    # OpenRLHF ends where dynamic filtering leaves fewer micro-batches than ranks.
    given += [*SMALL, *ON_CPU]
    if pictures or "dapo" in name:
        given += ["--actor.num_gpus_per_node", "1", "--ref.num_gpus_per_node", "1", "--vllm.num_engines", "1"]
    for model in ("critic", "reward"):
        if f"--{model}.num_gpus_per_node" in given:
            given += [f"--{model}.num_gpus_per_node", "2"]
    if "--algo.dynamic_filtering_enable" in given:
        given += ["--train.num_episodes", "4"]
    run = openrlhf.train(*given, "--algo", "sdpo", timeout=200)
    assert len(run.metrics["train/self_distillation/loss"]) >= 2
