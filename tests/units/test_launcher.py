"""The start-up file, the seam check, and what reward functions and agents get and give, without Ray."""

import asyncio
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sdpo_plugin.openrlhf_adapter import patch_points
from sdpo_plugin.openrlhf_adapter.launcher.startup import redirect


def test_only_the_hosts_launcher_with_our_flags_is_redirected():
    run = ["python", "-u", "-m", "openrlhf.cli.train_ppo_ray"]
    ours = ["python", "-u", "-m", "sdpo_plugin", "train"]
    assert redirect([*run, "--algo", "sdpo", "--x", "1"], []) == [*ours, "--algo", "sdpo", "--x", "1"]
    assert redirect([*run, "--algo=sdpo"], []) == [*ours, "--algo=sdpo"]
    assert redirect([*run, "--config", "r.yaml"], []) == [*ours, "--config", "r.yaml"]
    assert redirect([*run, "--plugins", "mine"], []) == [*ours, "--plugins", "mine"]
    assert redirect([*run, "--logger.mlflow.uri=x"], []) == [*ours, "--logger.mlflow.uri=x"]
    assert redirect([*run, "--algo.advantage.estimator", "rloo", "--logger.wandb.key", "x"], []) is None
    assert redirect([*run, "--x", "1"], ["toy"]) == [*ours, "--x", "1"]  # an installed plugin acts without --algo
    assert redirect(["python", "tool.py", "openrlhf.cli.train_ppo_ray", "--algo", "x"], ["toy"]) is None


def test_start_up_file_is_installed_and_costs_nothing():
    """Median over interpreter starts of the line itself, which must stay under 2 ms; it imports nothing of ours."""
    code = (
        "import sys, time, sysconfig, pathlib\n"
        "line = (pathlib.Path(sysconfig.get_paths()['purelib']) / 'sdpo_plugin_startup.pth').read_text()\n"
        "began = time.perf_counter(); exec(line); print(time.perf_counter() - began)\n"
        "assert not any(m.startswith('sdpo_plugin') for m in sys.modules)\n"
    )
    times = sorted(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5))
    assert times[2] < 2e-3


def test_the_command_works_verbatim_and_shows_one_help():
    command = [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", "--algo", "sdpo", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for flag in ("--actor.adam.lr", "--algo.advantage.estimator", "--algo NAME", "--distill.alpha", "--teacher.kind",
                 "--reprompt.template", "--diagnostics.on_collapse", "--config"):  # fmt: skip
        assert flag in shown, flag


def test_bad_configuration_is_one_line_on_the_command_line(openrlhf, tmp_path):
    done = openrlhf.command("train", "--algo", "sdpo", "--teacher.update_rate", "1", directory=tmp_path)
    error = "--teacher.update_rate 1.0: the teacher would be equal to the student; give --teacher.kind live, or --tea"
    assert done.returncode == 2
    assert done.stderr.rstrip().splitlines()[-1].startswith(f"openrlhf-sdpo: error: {error}")


def test_the_command_without_torch_says_how_to_install_it():
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['plugins']; import sdpo_plugin.__main__"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("openrlhf-sdpo: error: torch is not installed; pip install")
    assert len(run.stderr.splitlines()) == 1


def test_the_launcher_shows_its_arguments_without_secrets(capsys):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from sdpo_plugin.openrlhf_adapter.launcher.install import _Strategy, without_secrets

    args = SimpleNamespace(logger=SimpleNamespace(wandb=SimpleNamespace(key="sesame", org="us")),
                           reward=SimpleNamespace(remote_url=["http://me:sesame@h/judge"]), n=1)  # fmt: skip
    without_secrets(_Strategy.print)(object.__new__(_Strategy), "arguments:", args)
    assert capsys.readouterr().out == (
        "arguments: namespace(logger=namespace(wandb=namespace(key='***', org='us')), "
        "reward=namespace(remote_url=['http://me:***@h/judge']), n=1)\n"
    )


def test_a_cpu_is_not_given_what_needs_a_gpu(openrlhf, tmp_path):
    done = openrlhf.command("train", "--algo", "sdpo", "--ds.use_liger_kernel", directory=tmp_path)
    assert "--ds.use_liger_kernel as given needs a CUDA GPU, and this run is on CPU; leave it out" in done.stderr


def test_a_cluster_too_slow_to_start_is_started_once_more(monkeypatch):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    monkeypatch.setenv(cpu.ENABLED, "1")
    errors, started = ["The current node timed out during startup.", "no space left"], []

    def init(**settings):
        started.append(settings)
        if errors:
            raise Exception(errors.pop(0))
        return "a cluster"

    with pytest.raises(Exception, match="no space left"):
        cpu.with_resources(init)()
    assert started[0] == started[1] and cpu.with_resources(init)() == "a cluster"


def test_a_host_whose_patch_points_moved_is_rejected_by_name():
    moved = [
        patch_points.PatchPoint("openrlhf.utils.agent:SingleTurnAgentExecutor.no_such_method"),
        patch_points.PatchPoint("openrlhf.utils.config:hierarchize", ("args", "schema")),
        patch_points.PatchPoint("openrlhf.no_such_module:Engine"),
        patch_points.PatchPoint("openrlhf.utils.config:hierarchize", ("args",)),
    ]
    with pytest.raises(patch_points.IncompatibleOpenRLHF) as error:
        patch_points.check(moved)
    message = str(error.value)
    assert "openrlhf 0.11.2 cannot be extended; tested with 0.11.2" in message
    assert "openrlhf.utils.agent:SingleTurnAgentExecutor.no_such_method: not found" in message
    assert "openrlhf.utils.config:hierarchize: takes (args), expected also (schema)" in message
    assert "openrlhf.no_such_module:Engine: not found" in message and message.count("hierarchize") == 1
    with pytest.raises(patch_points.IncompatibleOpenRLHF, match="--actor.loss_agg_mode: no such flag"):
        patch_points.check_flags({flag for flag in patch_points.FLAGS if flag != "actor.loss_agg_mode"})


@pytest.fixture(scope="module")
def fetched():
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    cpu.enable()  # idempotent
    from sdpo_plugin.openrlhf_adapter.engine.engine import feedback_and_failures_kept

    def call(result):
        async def fetch(queries, prompts, labels):
            if isinstance(result, Exception):
                raise result
            return [result]

        return asyncio.run(feedback_and_failures_kept(fetch, asyncio.Semaphore())(["q"], ["p"], ["l"]))[0]

    return call


@pytest.mark.parametrize("feedback", ["expected 4", None, "", "x" * 2**20, {"not": "text"}])
def test_feedback_moves_to_what_the_host_passes_on(fetched, feedback):
    for form in (feedback, [feedback]):
        result = fetched({"rewards": 1.0, "feedback": form, "extra_logs": {"seconds": 2}})
        assert result == {"rewards": 1.0, "extra_logs": {"seconds": 2, "feedback": feedback}}


def test_no_feedback_changes_nothing(fetched):
    assert fetched({"rewards": 1.0}) == {"rewards": 1.0}


def test_a_failure_is_kept_as_data(fetched):
    assert "ZeroDivisionError: by zero" in fetched(ZeroDivisionError("by zero"))["extra_logs"]["reward_failure"]


def test_reward_functions_and_agents_are_given_plain_text():
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from openrlhf.utils.agent import AgentExecutorBase

    from sdpo_plugin.openrlhf_adapter.engine.engine import REQUEST, Engine, Prompt, Request

    class Environment(AgentExecutorBase):
        async def execute(self, prompt, label, **kwargs):
            given.append(prompt)
            return {"prompt": prompt.upper(), "label": label}

    async def serve(**changes):
        prompt = Prompt("say 1, say 2")
        prompt.request = Request(dataset=1, row=7, **changes)
        engine = object.__new__(Engine)  # without a model
        engine.executor = Environment()
        others = dict.fromkeys(("sampling_params", "max_length", "hf_tokenizer"))
        return await engine.generate_responses(pickle.loads(pickle.dumps(prompt)), num_samples=2, label="l", **others)

    for changes in ({}, {"seed": (1, 2)}):
        given = []
        responses = asyncio.run(serve(**changes))
        # What an agent makes of its prompt is its own business; the row is known all the same.
        assert [(r["prompt"], r["label"], r[REQUEST].row) for r in responses] == [("SAY 1, SAY 2", "l", 7)] * 2
        for text in given:
            for name in [name for name in dir(str) if not name.startswith("_")]:
                assert callable(getattr(text, name)), name
            assert type(text) is str
            assert text == "say 1, say 2" and text[4:5] == "1" and text < "say 2" and f"{text}" == text
            assert json.loads(json.dumps(text)) == text and type(pickle.loads(pickle.dumps(text))) is str
        assert len(given) == 2


def test_an_agent_that_changes_the_prompt_gets_the_message_that_nothing_can_stand_for_it(tmp_path):
    from sdpo_plugin.openrlhf_adapter.platform import cpu

    cpu.enable()
    from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor
    from transformers import AutoTokenizer

    from sdpo_plugin.config import ConfigError
    from sdpo_plugin.openrlhf_adapter.engine.engine import Engine, Prompt, Request
    from sdpo_plugin.testing import tiny_model

    class Room(AgentInstanceBase):
        def __init__(self):
            pass

        async def reset(self, states, **kwargs):
            return {"observation": states["observation"] + " I see a door."}

        async def step(self, states, **kwargs):
            raise AssertionError("nothing was to be sampled")

    async def serve():
        prompt = Prompt("say 1")
        prompt.request = Request(dataset=1, row=7, shown=[5, 6])
        engine = object.__new__(Engine)  # without a model
        engine.executor = MultiTurnAgentExecutor(Room)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
        others = {"sampling_params": SimpleNamespace(max_tokens=8, logprobs=None), "max_length": 64}
        await engine.generate_responses(prompt, label="", hf_tokenizer=tokenizer, **others)

    with pytest.raises(ConfigError, match=r"reset\(\) returned another observation.*generate_from_teacher"):
        asyncio.run(serve())
