"""The collapse monitor: what it measures, when it warns, and what it does then."""

import pytest
from common import ROWS, SDPO
from documented import DOCS

from sdpo_plugin.monitoring.collapse import CONTEXT_KL
from sdpo_plugin.report import read_scalars
from sdpo_plugin.testing import RunFailed


def test_the_gain_reaches_the_logs(recorded):
    kls = [value for _, value in recorded.metrics[f"train/{CONTEXT_KL}"]]
    assert len(kls) == 2 and min(kls) > 0
    assert "train/teacher/ema_distance" in recorded.metrics
    assert recorded.metrics["train/self_distillation/inactive_group_fraction"][0][1] == 0.0
    assert recorded.metrics["train/self_distillation/response_length_drift"][0][1] == 1.0
    for warning in ("collapse", "inactive"):
        assert recorded.metrics[f"train/warning/{warning}"] == [[1, 0.0], [2, 0.0]]
    assert not any(" of " in tag for tag in recorded.metrics)


def test_the_page_on_metrics_names_all_that_a_run_logs(recorded):
    page = (DOCS / "metrics.md").read_text()
    tags = {tag.partition("/")[2] for tag in recorded.metrics}
    assert len(tags) > 40 and {tag for tag in tags if f"`{tag}`" not in page} == set()


def test_stop_ends_the_run_with_a_checkpoint(openrlhf, model, reward, recorded, monkeypatch, tmp_path):
    """Where every look is a collapse (what the kl must reach is set out of reach)."""
    limits = "collapse.COLLAPSED, collapse.REFERENCE_CHECKS = 9.0, 1"
    (tmp_path / "demanding.py").write_text(f"from sdpo_plugin.monitoring import collapse\n{limits}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--diagnostics.on_collapse", "stop", "--diagnostics.patience", "1", "--ckpt.path", str(tmp_path / "ckpt")]
    flags += ["--logger.tensorboard_dir", str(tmp_path / "logs")]
    plugins = ["--plugins", "sdpo_plugin.testing", "demanding"]
    with pytest.raises(RunFailed, match=r"openrlhf-sdpo: stopped: .*uses its context less and less.*step 1 is saved"):
        openrlhf(model, ROWS, reward, *SDPO, *flags, *plugins, replay=recorded)
    assert (tmp_path / "ckpt" / "_actor" / "latest").read_text() == "global_step1"
    assert read_scalars(str(tmp_path / "logs"))["train/warning/collapse"] == [[1, 1.0]]
