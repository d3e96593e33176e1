"""Checks of files, data, models and GPUs before Ray starts and models are loaded.

As little as possible is read: one column of a dataset, configuration and tokenizer of a model, the source of a reward
function.
"""

from __future__ import annotations

import ast
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from sdpo_plugin import plugins
from sdpo_plugin.config import ConfigError
from sdpo_plugin.distillation.chat_arguments import chat_template_kwargs, teacher_chat_template_kwargs
from sdpo_plugin.distillation.prompts import require_printed, text_tokenizer
from sdpo_plugin.interface.rollout_batch import has_images, input_frame, prompt_messages
from sdpo_plugin.openrlhf_adapter import dates
from sdpo_plugin.openrlhf_adapter.controller import teacher_servers
from sdpo_plugin.openrlhf_adapter.launcher import images, labels, ring
from sdpo_plugin.openrlhf_adapter.patch_points import patch_point
from sdpo_plugin.openrlhf_adapter.platform.cluster import Cluster, require_gpus
from sdpo_plugin.openrlhf_adapter.worker import checkpoint

LOCK = ".openrlhf-sdpo.lock"
RENDERED_ROWS = 1000  # of each dataset; of the others, the first of every shape

blending_datasets = patch_point(
    "openrlhf.trainer.ppo_trainer:blending_datasets", "datasets", "strategy", "dataset_split"
)
preprocess_data = patch_point(
    "openrlhf.datasets.prompts_dataset:preprocess_data", "data", "input_key", "label_key", "apply_chat_template"
)


def check(args: Any, cluster: Cluster | None, cpu: bool) -> None:
    """Raise ConfigError for the first check that fails.

    Files are checked on this machine only if the run stays on it; a driver need not have the nodes' files.
    """
    require_gpus(args, cluster, cpu)
    written = {"--ckpt.output_dir": args.ckpt.output_dir, "--ckpt.path": args.ckpt.path}
    on_one_machine = cluster is None or cluster.nodes == 1
    if on_one_machine:
        for flag, path in written.items():
            writable(flag, path)
    for path, flag in {os.path.realpath(path): flag for flag, path in written.items()}.items():
        alone(flag, path)
    checkpoints(args)
    with_ring = args.ds.ring_attn_size > 1 and plugins.algorithm() is not None
    if with_ring:
        ring.check(args, cpu or not on_one_machine)
    if not on_one_machine:
        return
    reward(args)
    configs = []
    for flag, path in (
        ("--actor.model_name_or_path", args.actor.model_name_or_path),
        ("--critic.model_name_or_path", args.critic.model_name_or_path),
        ("--reward.model_name_or_path", args.reward.model_name_or_path),
    ):
        if path:
            configs.append((flag, path, model(flag, path)))
    if with_ring:
        if args.teacher.kind == "model":
            flag, path = "--teacher.model_name_or_path", args.teacher.model_name_or_path
            configs.append((flag, path, model(flag, path)))
        ring.models(args, configs)
    found = tokenizer(args)
    if plugins.algorithm() is not None and args.teacher.scored_by == "engine":
        teacher_servers.check(args, found, args.distill.topk if args.distill.mode == "topk" else 1)
    data(args)
    chats(args, found)
    if has_images(args) and plugins.algorithm() is not None:
        images.teacher(args)


def writable(flag: str, path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, f".writable-{os.getpid()}"), "w") as file:
            file.write(" " * 4096)
        os.remove(file.name)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written to ({error.strerror}); give another directory") from error


_locked: list[Any] = []  # files, open as long as this process lives


def alone(flag: str, path: str) -> None:
    """No other run that has not ended writes to the same directory; the system forgets a lock with its process."""
    try:
        file = open(os.path.join(path, LOCK), "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ConfigError(
            f"{flag} {path}: another run writes there ({file.read().strip()}); stop it, or give another directory"
        ) from error
    except OSError:
        return  # a directory of the nodes that this machine does not see, or a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M')}\n")
    file.flush()
    _locked.append(file)


def checkpoints(args: Any) -> None:
    """A checkpoint can be loaded if the run resumes from it, and is not overwritten if the run does not.

    A new run deletes and overwrites the checkpoints of an earlier one as if they were its own.
    """
    directory = os.path.join(args.ckpt.path, "_actor")
    if args.ckpt.load_enable:
        universal = args.ds.use_universal_ckpt  # DeepSpeed's own, which any number of ranks can read
        if universal:
            checkpoint.require_source(directory)
        checkpoint.require_readable(directory, {} if universal else checkpoint.written_with(args), universal)
        return
    best = bool(args.eval.dataset) and args.eval.steps > 0 and args.ckpt.best_metric_key != "none"
    if (args.ckpt.save_steps > 0 or best) and (named := checkpoint.named_latest(directory)):
        raise ConfigError(
            f"--ckpt.path {args.ckpt.path}: an earlier run has left {named} there, and this run would overwrite its "
            "checkpoints; give --ckpt.load_enable to resume from it, give another directory, or delete it"
        )


def reward(args: Any) -> None:
    """A reward function's or an agent's file."""
    if args.reward.remote_url and args.reward.remote_url.endswith(".py"):
        defines("--reward.remote_url", args.reward.remote_url, "reward_func")
    if args.train.agent_func_path:
        defines("--train.agent_func_path", args.train.agent_func_path, "AgentExecutor")


def defines(flag: str, path: str, name: str) -> None:
    """A Python file that defines `name`. It is not run: what it needs may be installed on the engines' nodes only."""
    try:
        with open(path) as file:
            tree = ast.parse(file.read(), path)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; give a Python file with {name}") from error
    except SyntaxError as error:
        raise ConfigError(f"{flag} {path}, line {error.lineno}: {error.msg}; correct the file") from error
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    if not bound & {name, "*"}:
        raise ConfigError(f"{flag} {path}: defines no {name}; it has {', '.join(sorted(bound)) or 'nothing'}; "
            f"define {name}, or give another file"
        )


def model(flag: str, path: str) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    return _loaded(flag, path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=True))


def tokenizer(args: Any) -> Any:
    """The policy's tokenizer, in its processor as in OpenRLHF, with a chat template where the data has chats."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    path = args.actor.model_name_or_path

    def load() -> Any:
        if not hasattr(AutoConfig.from_pretrained(path, trust_remote_code=True), "vision_config"):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
            assert hasattr(processor, "tokenizer"), "it has no tokenizer"
            return processor
        except Exception as error:
            raise ValueError(
                f"the model has a vision_config, so OpenRLHF loads its processor, which fails: {error}; "
                "copy preprocessor_config.json and processor_config.json of the base model into its directory"
            ) from error

    found = _loaded("--actor.model_name_or_path", path, load)
    try:
        text = text_tokenizer(found)
    except ConfigError as error:
        raise ConfigError(f"--actor.model_name_or_path {path}: {error}") from error
    if args.data.apply_chat_template and getattr(text, "chat_template", None) is None:
        raise ConfigError(
            f"--data.apply_chat_template: the tokenizer of {path} has no chat template; use an instruction-tuned "
            "model, add a chat_template.jinja to its directory, or give --data.input_template instead of this flag"
        )
    return found


def _loaded(flag: str, path: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the model's own code may raise anything
        reason = str(error).strip().splitlines()[0][:200]
        fix = "" if os.path.isdir(path) else "; give a directory with a Hugging Face model, or a model name on the Hub"
        raise ConfigError(f"{flag} {path}: cannot be loaded ({type(error).__name__}: {reason}){fix}") from error


def data(args: Any) -> None:
    """Every dataset that will be blended, each on its own, so that the message can name it."""
    if args.data.input_template and not args.data.apply_chat_template:
        input_frame(args.data.input_template)
    for dataset, evaluation in datasets(args):
        flag = "--eval.dataset" if evaluation else "--data.prompt_dataset"
        rows = load(args, flag, dataset, args.eval.split if evaluation else args.data.prompt_split)
        where = f"{flag} {dataset}"
        if len(rows) == 0:
            raise ConfigError(f"{where}: has no rows; give a dataset with rows")
        for name, key in (("input_key", args.data.input_key), ("label_key", args.data.label_key)):
            if key and key not in rows.column_names:
                has = ", ".join(rows.column_names)
                raise ConfigError(f"--data.{name} {key}: {where} has no such column; it has {has}")
        prompts(where, rows[args.data.input_key], args)
        labels.check(args, where, rows)
        try:
            plugins.active().hook.openrlhf_dataset(dataset=rows, evaluation=evaluation, args=args)
        except ConfigError as error:
            raise ConfigError(f"{error} (in {where})") from error


def datasets(args: Any) -> list[tuple[str, bool]]:
    """Each dataset of the run, and whether it is for evaluation."""
    found = [(name.strip(), False) for name in args.data.prompt_dataset.split(",")]
    return found + [(name.strip(), True) for name in (args.eval.dataset or "").split(",") if name.strip()]


def load(args: Any, flag: str, dataset: str, split: str) -> Any:
    """The dataset as OpenRLHF loads it."""
    path = dataset.split("@")[0]
    if os.path.splitext(path)[1] in (".json", ".jsonl", ".csv", ".parquet", ".arrow") and not os.path.exists(path):
        raise ConfigError(f"{flag} {dataset}: no such file; give an existing file, or a dataset on the Hub")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ConfigError(f"{flag} {dataset}: is an empty file; give a file with rows")
    dates.bind()
    quiet = SimpleNamespace(args=args, print=lambda *args: None, is_rank_0=lambda: False)
    try:
        return blending_datasets(dataset, None, quiet, dataset_split=split)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(
            f"{flag} {dataset}: cannot be loaded ({type(error).__name__}: {reason}); give a file, a directory, or a "
            "dataset name on the Hugging Face Hub"
        ) from error


def chats(args: Any, tokenizer: Any) -> None:
    """The chat template renders rows of every shape and, with an algorithm, the user turn that the teacher is given."""
    if not args.data.apply_chat_template:
        return
    chat = chat_template_kwargs(args)
    render = partial(text_tokenizer(tokenizer).apply_chat_template, **chat)
    for dataset, evaluation in datasets(args):
        flag = "--eval.dataset" if evaluation else "--data.prompt_dataset"
        rows = load(args, flag, dataset, args.eval.split if evaluation else args.data.prompt_split)
        if has_images(args) and plugins.algorithm() is not None:
            images.check(args, tokenizer, f"{flag} {dataset}", rows, evaluation)
        shapes = set()
        for row, prompt in enumerate(rows[args.data.input_key]):
            if (shape := _shape(prompt)) in shapes and row >= RENDERED_ROWS:
                continue
            shapes.add(shape)
            record = {args.data.input_key: prompt}
            try:
                if plugins.algorithm() is None:
                    preprocess_data(record, None, args.data.input_key, None, render)
                else:
                    require_printed(prompt_messages(record, args), tokenizer, chat)
                    if not evaluation:
                        require_printed(prompt_messages(record, args), tokenizer, teacher_chat_template_kwargs(args))
            except Exception as error:  # a template may raise anything
                reason = error if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"--data.input_key {args.data.input_key}: {flag} {dataset}, row {row}: {reason}"
                ) from error


def _shape(prompt: Any) -> Any:
    """What a chat template may treat differently: roles, types of content, and other keys."""
    if not isinstance(prompt, list):
        return type(prompt)
    return tuple(
        (message["role"], _kinds(message.get("content")), *(key for key, value in message.items() if value is not None))
        for message in prompt
    )


def _kinds(content: Any) -> Any:
    return tuple(part.get("type") for part in content) if isinstance(content, list) else type(content)


def prompts(where: str, column: Iterable[Any], args: Any) -> None:
    """Text, or with `--data.apply_chat_template` also a chat."""
    for row, prompt in enumerate(column):
        if isinstance(prompt, str) or (args.data.apply_chat_template and _is_chat(prompt)):
            continue
        expected = "text or a list of messages with role and content" if args.data.apply_chat_template else "text"
        fix = "" if args.data.apply_chat_template or not _is_chat(prompt) else "; give --data.apply_chat_template"
        raise ConfigError(
            f"--data.input_key {args.data.input_key}: {where}, row {row} has {_shown(prompt)} there; expected "
            f"{expected}{fix}"
        )


def _is_chat(prompt: Any) -> bool:
    """Messages with a role and text or parts; those before the last may have none, such as a tool call."""
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and _is_content(m.get("content"), i < len(prompt) - 1)
        for i, m in enumerate(prompt)
    )  # fmt: skip


def _is_content(content: Any, may_be_none: bool) -> bool:
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return isinstance(content, str) or (content is None and may_be_none)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
