"""Bad input stops before anything loads, with a message that names the flag, the value and the fix."""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import pytest

from sdpo_plugin import plugins
from sdpo_plugin.algorithms import no_reward
from sdpo_plugin.config import (
    ConfigError,
    DiagnosticsConfig,
    DistillConfig,
    RepromptConfig,
    TeacherConfig,
)
from sdpo_plugin.openrlhf_adapter.launcher import launch, recipe


def host_parser() -> argparse.ArgumentParser:
    """A stand-in with the host flags these tests name; the real parser is reached in test_openrlhf.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--actor.model_name_or_path")
    parser.add_argument("--actor.adam.lr", type=float, default=1e-6)
    parser.add_argument("--actor.adam.betas", type=float, nargs=2, default=(0.9, 0.95))
    parser.add_argument("--vllm.enforce_eager", action="store_true", default=False)
    parser.add_argument("--actor.muon.nesterov", action="store_true", default=True)
    parser.add_argument("--actor.muon.no_nesterov", dest="actor.muon.nesterov", action="store_false")
    for flag, value in {
        "ds.lora.rank": 0, "ds.zero_stage": 2, "ds.zpg": 1, "ds.ring_attn_size": 1, "ds.tensor_parallel_size": 1,
        "data.max_images_per_prompt": 0, "ds.enable_sleep": False, "algo.kl.init_coef": 0.0,
        "ds.lora.target_modules": "", "algo.advantage.is_correction_level": "off",
        "algo.advantage.is_correction_mode": "mask", "algo.advantage.is_correction_gating": "ratio",
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", default=value, type=type(value))
    parser.add_argument("--logger.tensorboard_dir")
    for flag in (
        "train.async_enable", "train.enable_ema", "algo.kl.use_loss", "ds.deepcompile", "data.apply_chat_template",
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", action="store_true")
    return parser


def parse(*arguments: str) -> argparse.Namespace:
    return launch.parse(host_parser(), list(arguments), on_cpu=False)


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (DistillConfig, {"weight": 1.5}, r"--distill.weight 1.5: give a number in \[0, 1\]"),
        (DistillConfig, {"weight": -0.1}, r"--distill.weight -0.1: give a number in \[0, 1\]"),
        (DistillConfig, {"weight": float("nan")}, r"--distill.weight nan"),
        (DistillConfig, {"alpha": 2.0}, r"--distill.alpha 2.0: give a number in \[0, 1\]"),
        (DistillConfig, {"mode": "sampled", "alpha": 0.5}, r"--distill.alpha 0.5: .* give --distill.alpha 1"),
        (DistillConfig, {"mode": "topk", "topk": None}, r"--distill.topk None: .* give --distill.topk 100"),
        (DistillConfig, {"mode": "topk", "topk": 0}, r"--distill.topk 0: give a positive integer"),
        (DistillConfig, {"mode": "fulll"}, r"--distill.mode fulll: choose one of full, topk, sampled"),
        (DistillConfig, {"is_clip": 0.0}, r"--distill.is_clip 0.0: give a positive number or none"),
        (DistillConfig, {"skip_tokens": -1}, r"--distill.skip_tokens -1"),
        (TeacherConfig, {"update_rate": 0.0}, r"--teacher.update_rate 0.0: .* give --teacher.kind base"),
        (TeacherConfig, {"update_rate": 1.0}, r"--teacher.update_rate 1.0: .* give --teacher.kind live, or --"),
        (TeacherConfig, {"update_rate": 1.0, "kind": "trust_region", "sync_steps": 2}, r"give --teacher.kind live$"),
        (TeacherConfig, {"max_tokens_per_gpu": 0}, r"--teacher.max_tokens_per_gpu 0: give a positive integer"),
        (TeacherConfig, {"kind": "model"}, r"--teacher.kind model: .*; give --teacher.model_name_or_path"),
        (TeacherConfig, {"model_name_or_path": "x"}, r"_path x: not used by --teacher.kind ema; give --teacher.kind"),
        (
            TeacherConfig, {"kind": "model", "model_name_or_path": "x", "zero_stage": 2},
            r"--teacher.zero_stage 2: the teacher is either whole .* give 0 or 3",
        ),
        (TeacherConfig, {"kind": "frozen"}, r"--teacher.kind frozen: choose one of live, base, ema"),
        (RepromptConfig, {"max_len": 0}, r"--reprompt.max_len 0: give a positive integer"),
        (RepromptConfig, {"template": "{solution}"}, r"--reprompt.template .*must contain \{prompt\}"),
        (DiagnosticsConfig, {"interval": 0}, r"--diagnostics.interval 0"),
        (DiagnosticsConfig, {"log_samples": -1}, r"--diagnostics.log_samples -1: give an integer >= 0"),
    ],
)
def test_out_of_range(group, values, message):
    with pytest.raises(ConfigError, match=message):
        group(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo", "spdo"], r"--algo spdo: unknown algorithm; choose one of .*sdpo"),
        (["--algo", "sdpo", "--distill.weight", "2"], r"--distill.weight 2.0: give a number in \[0, 1\]"),
        (["--algo", "sdpo", "--ds.deepcompile"], r"--ds.deepcompile is not supported .*leave the flag out"),
        (["--algo=sdpo", "--ds.zpg=8", "--ds.lora.rank=4", "--ds.zero_stage=3"], r"zpg 8: .* would stay as it began; "),
        (["--algo", "sdpo", "--ds.tensor_parallel_size", "2"], r"--ds.tensor_parallel_size is not supported .*size 1"),
        (["--algo", "sdpo", "--teacher.kind", "base", "--teacher.save"], r"--teacher.save True: .* --teacher.kind ema"),
        (["--algo", "sdpo", "--train.async_enable", "--rollout.deterministic"], r"--rollout.deterministic True: "),
        (["--algo", "sdpo", "--diagnostics.log_samples", "4"], r"samples 4: .* give --logger.tensorboard_dir"),
        (["--diagnostics.log_samples", "4"], r"--diagnostics.log_samples 4: without --algo .* give --algo sdpo"),
        (["--algo=sdpo", "--diagnostics.log_samples=4", "--distill.weight=0"], r"weight 0 .* give a weight above 0"),
        (["--data.chat_template_kwargs", "enable_thinking=false"], r"kwargs enable_thinking=false: not a JSON object"),
        (["--data.chat_template_kwargs", "[1]"], r"--data.chat_template_kwargs \[1\]: not a JSON object"),
        (["--data.chat_template_kwargs", '{"tokenize": true}'], r"OpenRLHF sets tokenize itself; leave tokenize out"),
        (["--data.chat_template_kwargs", '{"x": 1}'], r'kwargs {"x": 1}: .* give --data.apply_chat_template'),
        (["--algo=sdpo", "--reprompt.chat_template_kwargs", "x"], r"--reprompt.chat_template_kwargs x: not a JSON ob"),
        (["--algo=sdpo", "--reprompt.chat_template_kwargs", '{"x": 1}'], r'--reprompt.* give --data.apply_chat_temp'),
        (["--algo", "sdpo", "--algo.advantage.is_correction_level", "seq"], r"level seq, .*; give .*_mode mask"),
        (["--algo", "sdpo", "--algo.advantage.is_correction_gating", "tv"], r"gating tv: .*; give .*_mode mask"),
        (
            ["--algo=sdpo", "--distill.generate_from_teacher", "--reprompt.template", "{prompt}{privileged_context}",
             "--algo.advantage.is_correction_level", "token"],
            r"is_correction_level token: .*; give off",
        ),
        (["--plugins", "no_such_module"], r"--plugins no_such_module: No module named"),
        (["--config", "/no/such/recipe.yaml"], r"--config /no/such/recipe.yaml: .*No such file"),
    ],
)
def test_command_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


def test_a_consensus_needs_no_reward_function():
    """Unless a policy loss, or an algorithm that looks at rewards, needs one."""
    label_free = ["--reprompt.demonstration", "consensus"]

    parser = host_parser()
    for flag in ("reward.remote_url", "reward.model_name_or_path", "train.agent_func_path"):
        parser.add_argument(f"--{flag}")

    def reward(*arguments):
        return vars(launch.parse(copy.deepcopy(parser), list(arguments), on_cpu=False))["reward.remote_url"]

    assert reward("--algo", "sdpo", *label_free) == no_reward.PATH
    assert reward("--algo", "sdpo", *label_free, "--reward.remote_url", "mine.py") != no_reward.PATH
    for other in (["sdpo"], ["sdpo", *label_free, "--distill.weight", "0.5"], ["srpo", *label_free]):
        assert reward("--algo", *other) is None
    with pytest.raises(ConfigError, match="--reprompt.demonstration consensus: --algo sdzero shows no demonstration"):
        reward("--algo", "sdzero", *label_free)


@pytest.mark.parametrize("weight", ["0.5", "1"])
@pytest.mark.parametrize("mode", [[], ["--train.async_enable"]], ids=["in step", "asynchronous"])
def test_the_rollout_correction_is_what_the_user_gave(mode, weight):
    hybrid = ["--algo", "sdpo", "--distill.weight", weight, *mode]
    asked = ["--algo.advantage.is_correction_level", "seq", "--algo.advantage.is_correction_mode", "mask"]
    assert vars(parse(*hybrid, *asked))["algo.advantage.is_correction_level"] == "seq"
    assert vars(parse(*hybrid, *asked[:1], "off"))["algo.advantage.is_correction_level"] == "off"
    assert vars(parse(*hybrid))["algo.advantage.is_correction_level"] == "token"
    alone = ["--algo", "sdpo", "--distill.weight", "0", *mode]
    assert vars(parse(*alone))["algo.advantage.is_correction_level"] == "off"
    behind = ["--distill.generate_from_teacher", "--reprompt.template", "{prompt}{privileged_context}"]
    assert vars(parse(*hybrid, *behind))["algo.advantage.is_correction_level"] == "off"


def test_a_value_of_the_wrong_type_is_argparse_s_error(capsys):
    with pytest.raises(SystemExit):
        parse("--algo", "sdpo", "--distill.alpha", "half")
    assert "argument --distill.alpha: invalid float value: 'half'" in capsys.readouterr().err


def test_defaults_are_the_dataclasses():
    args = parse("--algo", "sdpo")
    values = vars(args)
    for group in (DistillConfig, TeacherConfig, RepromptConfig, DiagnosticsConfig):
        for name, value in vars(group()).items():
            assert values[f"{group.prefix}.{name}"] == value, name


def test_recipe_is_a_command_line_that_comes_first(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "algo: {name: sdpo}\n"
        "actor: {adam: {lr: 1e-5, betas: [0.8, 0.9]}, muon: {nesterov: false}}\n"
        "vllm: {enforce_eager: true}\n"
        "distill: {alpha: 0.25, is_clip: null, add_tail: false}\n"
        "reprompt: {template: '{prompt} -- {feedback}'}\n"
    )
    args = vars(parse("--config", str(path), "--distill.alpha", "0.75"))
    assert args["algo.name"] == "sdpo" and args["actor.adam.lr"] == 1e-5 and args["actor.adam.betas"] == [0.8, 0.9]
    assert args["vllm.enforce_eager"] is True and args["actor.muon.nesterov"] is False
    assert args["distill.is_clip"] is None and args["distill.add_tail"] is False
    assert args["distill.alpha"] == 0.75 and args["reprompt.template"] == "{prompt} -- {feedback}"


@pytest.mark.parametrize(
    ("text", "flag", "value"),
    [
        ("diagnostics: {on_collapse: off}", "diagnostics.on_collapse", "off"),
        ("algo: {advantage: {is_correction_level: off}}", "algo.advantage.is_correction_level", "off"),
        ("distill: {topk: 0100}", "distill.topk", 100),
        ("distill: {topk: 1_000}", "distill.topk", 1000),
        ("distill: {is_clip: ~}", "distill.is_clip", None),
        ("distill: {is_clip: 'none'}", "distill.is_clip", None),
        ("actor: {adam: {lr: 1e-5}}", "actor.adam.lr", 1e-5),
        ("actor: {adam: {lr: .5}}", "actor.adam.lr", 0.5),
        ("actor: {adam: {betas: [0.9, 1e-3]}}", "actor.adam.betas", [0.9, 1e-3]),
        ("vllm: {enforce_eager: on}", "vllm.enforce_eager", True),
        ("vllm: {enforce_eager: False}", "vllm.enforce_eager", False),
        ("distill: {add_tail: off}", "distill.add_tail", False),
        ("reprompt: {solution_template: '{successful_previous_attempt}'}", "reprompt.solution_template",
         "{successful_previous_attempt}"),
        ("logger: {tensorboard_dir: }", "logger.tensorboard_dir", None),
        *((f"logger: {{tensorboard_dir: {word}}}", "logger.tensorboard_dir", word.strip("'")) for word in (
            "12:30:45", "2024-05-01", "2024-05-01T10:00:00Z", "007", "0x10", "0o17", "1.10", "1e5", "1_000", "yes",
            "NO", "true", "True", ".inf", "'null'", "'2'", "''", "=x", "-x",
        )),
    ],
)  # fmt: skip
def test_a_value_is_the_text_that_the_flag_is_given(tmp_path, text, flag, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    found = vars(parse("--config", str(path)))[flag]
    assert found == value and type(found) is type(value)


def test_keys_are_words_and_plugins_may_be_one(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: &base {lr: 1e-5}\non: {1: x}\nactor: {adam: {<<: *base}}\nplugins: mine")
    found = recipe.load(str(path))
    assert found == {"base.lr": "1e-5", "on.1": "x", "actor.adam.lr": "1e-5", "plugins": "mine"}
    assert launch.early(["--config", str(path)])[0].plugins == ["mine"]


def test_a_later_recipe_says_only_what_differs(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("algo: {name: sdpo}\nactor: {adam: {lr: 1e-5}}\ndistill: {alpha: 0.25, topk: 7, is_clip: 3.0}\n")
    second.write_text("actor: {adam: {lr: 1e-4}}\ndistill: {alpha: 0.5, is_clip: null}\n")
    args = vars(parse("--config", str(first), "--distill.alpha=1", "--config", str(second)))
    assert (args["algo.name"], args["actor.adam.lr"], args["distill.topk"]) == ("sdpo", 1e-4, 7)
    assert args["distill.is_clip"] is None and args["distill.alpha"] == 1.0
    assert vars(parse("--config", str(second), "--config", str(first)))["actor.adam.lr"] == 1e-5


def test_chat_template_arguments_are_json_in_a_recipe_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {apply_chat_template: true, chat_template_kwargs: '{\"enable_thinking\": false}'}\n")
    assert vars(parse("--config", str(path)))["data.chat_template_kwargs"] == '{"enable_thinking": false}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {chat_template_kwargs: {enable_thinking: false}}", "did you mean data.chat_template_kwargs?"),
        ("distil: {alpha: 1}", "unknown key distil.alpha; did you mean distill.alpha?"),
        ("actor: {adam: {rl: 1}}", "unknown key actor.adam.rl; did you mean actor.adam.lr?"),
        ("vllm: {enforce_eager: 3}", "vllm.enforce_eager: 3 is neither true nor false; give one"),
        ("vllm: {enforce_eager: }", "vllm.enforce_eager: null is neither true nor false; give one"),
        ("actor: {adam: {lr: null}}", "actor.adam.lr: null is not a valid value; give a value, or leave the key out"),
        ("teacher: ", "unknown key teacher"),
        ("[1, 2]", "expected nested keys, found list"),
        ("a: [", "--config"),
        ("actor: {adam: {lr: 1}}\nalgo: {name: sdpo}\nactor: {adam: {lr: 2}}", 'duplicate key "actor" in line 3'),
        ("a: &a {b: *a}", "contain themselves"),
        ("[" * 500, "nested too deeply"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (b"a: \xff", "unacceptable character"),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        parse("--config", str(path))
    assert message in str(error.value)


def test_an_algorithm_s_defaults_are_below_recipe_and_command_line(monkeypatch, tmp_path):
    (tmp_path / "variant.py").write_text(
        "from sdpo_plugin.algorithms.sdpo import SDPO\n"
        "from sdpo_plugin import hookimpl\n"
        "class Variant(SDPO):\n"
        "    name = 'variant'\n"
        "    defaults = {'distill.alpha': 1.0, 'teacher.kind': 'base'}\n"
        "@hookimpl\n"
        "def openrlhf_algorithms():\n"
        "    return [Variant]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = vars(parse("--plugins", "variant", "--algo", "variant", "--distill.alpha", "0.5"))
    assert args["distill.alpha"] == 0.5 and args["teacher.kind"] == "base"
    assert type(plugins.algorithm()).__name__ == "Variant"


def test_the_options_page_is_current():
    shown = subprocess.run([sys.executable, "-m", "sdpo_plugin", "options"], capture_output=True, text=True)
    assert (Path(__file__).parents[2] / "docs" / "options.md").read_text() == shown.stdout


def test_the_variants_have_the_published_defaults():
    parser = host_parser()
    for flag in ("reward.remote_url", "reward.model_name_or_path", "train.agent_func_path"):
        parser.add_argument(f"--{flag}")
    for flag in ("rollout.temperature", "rollout.top_p", "algo.advantage.is_correction_threshold"):
        parser.add_argument(f"--{flag}")
    published = {
        "sdpo": {"distill.alpha": 0.5, "teacher.update_rate": 0.05, "algo.advantage.is_correction_threshold": [0, 2]},
        "sdft": {"distill.alpha": 0.0, "teacher.update_rate": 0.01, "distill.skip_tokens": 3, "distill.mode": "full"},
        "opsd": {"distill.alpha": 0.0, "distill.kl_clip": 0.05, "rollout.temperature": 1.1, "rollout.top_p": 0.95,
                 "distill.skip_tokens": 0, "teacher.kind": "base", "algo.advantage.is_correction_level": "off"},
        "sdzero": {"distill.alpha": 1.0, "distill.topk": 64, "distill.support": "teacher", "teacher.kind": "base"},
    }  # fmt: skip
    for algorithm, values in published.items():
        args = vars(launch.parse(copy.deepcopy(parser), ["--algo", algorithm], on_cpu=False))
        assert values.items() <= args.items(), algorithm


def test_recipe_names_are_flat():
    assert recipe._flatten({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {"a.b.c": 1, "a.d": 2, "e": 3}


def test_a_kl_penalty_that_nothing_reads_is_pointed_out(caplog):
    penalty = ("--algo", "sdpo", "--algo.kl.init_coef", "0.01")
    parse(*penalty, "--algo.kl.use_loss")
    parse(*penalty, "--distill.weight", "0.5")
    assert not caplog.records
    parse(*penalty)
    assert "--algo.kl.init_coef 0.01: a penalty on rewards, which has no effect" in caplog.text
