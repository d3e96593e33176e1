"""What a run prints, first and last, when it is started as a user starts it."""

from common import ROWS, SDPO

from sdpo_plugin.openrlhf_adapter.launcher import quiet


def test_a_run_does_not_begin_or_end_with_warnings_of_libraries(openrlhf, model, reward):
    """A real engine and one step, every process an interpreter of its own; Ray brings the workers' lines."""
    run = openrlhf(model, ROWS, reward, *SDPO, fresh=True, timeout=500.0)
    lines = run.output.splitlines()
    assert lines[0].startswith("openrlhf-sdpo: OpenRLHF runs on the CPU")
    assert lines[1].startswith("openrlhf-sdpo: --algo sdpo; plugins: ")
    hidden = ("pynvml", "ZeroCopyTensorsWarning", quiet.NOT_WRITABLE)
    assert [line for line in lines if any(text in line for text in hidden)] == []
    assert f"openrlhf-sdpo: finished; the model is in {run.directory}/model" in lines[-5:]
    assert "Warning" not in "".join(lines[:3] + lines[-3:])
