"""What a failed run says and its exit code, without a run (with one: integration/test_failures.py)."""

import errno
import subprocess
import sys

import pytest
import torch

from sdpo_plugin.config import ConfigError, StopTraining
from sdpo_plugin.distillation.context import FeedbackError
from sdpo_plugin.openrlhf_adapter import failures
from sdpo_plugin.openrlhf_adapter.failures import (
    MACHINE,
    REWARD,
    SETTINGS,
    SOFTWARE,
    STOPPED,
    MetricsDiffer,
    NotFinite,
    RewardError,
)
from sdpo_plugin.openrlhf_adapter.patch_points import IncompatibleOpenRLHF


class FromActor(Exception):
    """As Ray's `RayTaskError`."""

    def __init__(self, cause, function_name="ray::PolicyWorker.fit()"):
        super().__init__(str(cause))
        self.cause, self.function_name, self.traceback_str = cause, function_name, "Traceback ..."


class ActorDiedError(Exception):
    """As Ray's; of an actor whose constructor raised, the error is its argument."""

    def __init__(self, died_of):
        super().__init__(died_of)
        self._actor_init_failed = isinstance(died_of, Exception)


DIED = "The actor died unexpectedly.\n\tclass_name: PolicyWorker\nThe actor died because it was OOM"


@pytest.mark.parametrize(
    "error, code, what",
    [
        (ConfigError("--x 1: no"), SETTINGS, "--x 1: no"),
        (FromActor(FromActor(ConfigError("--x 1: no"))), SETTINGS, "--x 1: no"),
        (StopTraining("the teacher has collapsed"), STOPPED, "stopped: the teacher has collapsed"),
        (FromActor(RewardError("reward.py: KeyError: 'x'\nTraceback")), REWARD, "reward.py: KeyError: 'x'"),
        (FromActor(FeedbackError("feedback is int, not text")), REWARD, "feedback is int, not text"),
        (IncompatibleOpenRLHF("moved"), SOFTWARE, "moved"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), MACHINE, "out of memory: CUDA out of memory. Tried"),
        (OSError(errno.ENOSPC, "No space left on device"), MACHINE, "[Errno 28] No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), MACHINE,
         "a file could not be written completely (is the disk full?): [enforce fail at inline_container.cc:672] . "
         "unexpected pos 576 vs 534"),
        (FromActor(OSError("1000 requested and 0 written")), MACHINE,
         "a file could not be written completely (is the disk full?): 1000 requested and 0 written"),
        (FromActor(RuntimeError("PytorchStreamReader failed reading zip archive"), "init()"), MACHINE,
         "a file of the checkpoint is damaged: PytorchStreamReader failed reading zip archive"),
        (FromActor(RuntimeError("Error(s) in loading state_dict for Llama:\n\tsize mismatch for x: [2] and [3]")),
         SETTINGS, "--ckpt.load_enable: the checkpoint belongs to another model: Error(s) in loading state_dict for "
         "Llama: size mismatch for x: [2] and [3]"),
        (FromActor(NotFinite("an update that is not finite: nan")), SETTINGS, "an update that is not finite: nan"),
        (FromActor(MetricsDiffer("metrics differ: x")), SOFTWARE, "metrics differ: x"),
        (ActorDiedError(DIED), MACHINE, "PolicyWorker died: it was OOM"),
        (FromActor(KeyError("prompt")), SOFTWARE, "KeyError: 'prompt'"),
        (ActorDiedError(FromActor(ConfigError("--x 1: no"))), SETTINGS, "--x 1: no"),
        (FromActor(ActorDiedError(FromActor(ConfigError("--x 1: no")))), SETTINGS, "--x 1: no"),
        (ActorDiedError(FromActor(KeyError("prompt"))), SOFTWARE, "KeyError: 'prompt'"),
        (FromActor(RuntimeError("[gloo] Connection closed by peer [10.0.0.2]"), "fit()"), MACHINE,
         "a process died that fit() was talking to: [gloo] Connection closed by peer [10.0.0.2]"),
    ],
)
def test_whose_fault_it_is(error, code, what):
    failure = failures.classify_error(error)
    assert (failure.code, failure.what) == (code, what)


def test_what_ray_itself_says_of_a_constructor_that_raised():
    from ray.exceptions import ActorDiedError, RayTaskError

    inner = RayTaskError("__init__", "Traceback ...", ConfigError("--x 1: no"), proctitle="ray::Controller.__init__")
    failure = failures.classify_error(ActorDiedError(inner))
    assert (failure.code, failure.what, failure.where) == (SETTINGS, "--x 1: no", "ray::Controller.__init__")


def test_an_engine_that_cannot_start_is_explained():
    """By what vLLM raised, even if Ray could not bring the exception itself."""
    from ray.exceptions import ActorDiedError, RayTaskError

    class Refused(Exception):
        def __reduce__(self):
            raise TypeError("cannot be pickled")

    trace = 'Traceback ...\n  File "config.py", line 3, in check\n'
    for cause in (ValueError("max_model_len (128)\n  is too long"), Refused("max_model_len (128)\n  is too long")):
        name = f"{type(cause).__module__}.{type(cause).__name__}".removeprefix("builtins.")
        inner = RayTaskError("__init__", f"{trace}{name}: {cause}\n", cause, proctitle="ray::Engine.__init__")
        failure = failures.classify_error(ActorDiedError(inner))
        assert failure.code == SETTINGS and failure.what.startswith("vLLM cannot serve --actor.model_name_or_path")
        assert failure.what.endswith(f"{type(cause).__name__}: max_model_len (128) is too long")


def test_the_message_names_the_file_with_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(tmp_path))
    try:
        {}["prompt"]
    except KeyError as error:
        code, message = failures.format_error(error)
    first, where, fix, kept = message.splitlines()
    assert code == SOFTWARE and first == "openrlhf-sdpo: error: KeyError: 'prompt'"
    assert "test_failures.py, line" in where and "report it" in fix
    assert '{}["prompt"]' in next(tmp_path.iterdir()).read_text() and str(tmp_path) in kept
    assert failures.format_error(ConfigError("--x 1: no")) == (SETTINGS, "openrlhf-sdpo: error: --x 1: no")


def test_no_secret_is_reported_and_only_its_owner_reads_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(tmp_path))
    error = ValueError("no answer from https://me:sesame@h/x, namespace(key='sesame'), half \ud83d")
    _, message = failures.format_error(error)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and file.name in message
    for shown in (message, file.read_text(), failures.format_error(ConfigError(f"--logger.mlflow.uri {error}"))[1]):
        assert "https://me:***@h/x, namespace(key='***')" in shown and "sesame" not in shown


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_a_limit_cuts_off_is_the_machines_fault(tmp_path, zipped):
    """What torch says of it, in a process whose files may have 64 KiB."""
    code = (
        "import resource, signal, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        f"torch.save(torch.zeros(1 << 20), {str(tmp_path / 'x.pt')!r}, _use_new_zipfile_serialization={zipped})"
    )
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True).stderr
    failure = failures.classify_error(RuntimeError(said.rstrip().splitlines()[-1].removeprefix("RuntimeError: ")))
    assert failure.code == MACHINE and failure.what.startswith("a file could not be written"), said


def test_a_full_disk_keeps_no_message_back(monkeypatch):
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: "/no/such/directory")
    assert failures.format_error(ValueError("x"))[1].count("ValueError: x") == 2  # what, and the traceback
