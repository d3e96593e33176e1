"""The report without a browser: what is read from a run, what the page holds, and the view in the terminal."""

import json
import re

import made_run
import pytest

from sdpo_plugin.config import ConfigError
from sdpo_plugin.openrlhf_adapter.launcher import cli
from sdpo_plugin.report import command, page, read_scalars, terminal
from sdpo_plugin.report.events import read_run, thinned
from sdpo_plugin.report.readable import LEVELS, disagreement, level, visible

# What a terminal would obey, what turns the direction of writing, halves of surrogate pairs.
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module", autouse=True)
def bundled():
    """The library's JavaScript is put together once, which takes a second or more."""
    text = page.vl_convert.javascript_bundle(page.EXPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.vl_convert, "javascript_bundle", lambda snippet: text)
        yield


def blocks(html: str) -> tuple[dict, dict]:
    """The page's data: of the curves, and of the samples."""
    found = re.findall(r'<script type="application/json" id="(\w+)-data">(.*?)</script>', html, re.DOTALL)
    data = {name: json.loads(text) for name, text in found}
    return data["curves"], data["samples"]


def markup(html: str) -> str:
    """The page without its scripts."""
    return re.sub(r'<script type="module">.*?</script>', "", html, flags=re.DOTALL)


def written(directory, *arguments) -> tuple[str, dict, dict]:
    out = directory / "report.html"
    command.main([*arguments, "--out", str(out)])
    html = out.read_text(encoding="utf-8")
    return html, *blocks(html)


def test_the_page_holds_what_the_runs_logged(tmp_path):
    _, curves, samples = written(tmp_path, *made_run.two_runs(tmp_path))
    base, ema = curves["runs"]
    assert (base["name"], ema["name"]) == ("base", "ema 0.05")
    steps, values = base["curves"]["train/rollout/reward_mean"]
    logged = read_scalars(str(tmp_path / "base"))["train/rollout/reward_mean"]
    assert steps == [step for step, _ in logged] and values == pytest.approx([value for _, value in logged], abs=1e-4)
    assert base["axes"]["generations"][:3] == [96, 192, 288] and base["axes"]["step"] == list(range(1, 61))
    assert dict(base["timing"]).keys() == {"generation", "make_experience", "ppo_train", "broadcast", "other"}
    assert [chart["title"] for chart in curves["sections"]["monitor"]][:2] == ["Context KL", "Log ratio on failures"]
    assert base["warnings"] == [] and base["monitored"]
    assert ema["warnings"] == [[step, "collapse"] for step in (20, 25, 30, 35, 40)]
    assert min(ema["curves"]["context KL fraction"][1]) < 0.1 < 0.85 < min(base["curves"]["context KL fraction"][1])
    assert samples["runs"][0]["recorded"] == 40 and samples["runs"][1]["recorded"] == 0
    first = samples["runs"][0]["shown"][0]
    made = made_run.sample(1)
    assert [samples["vocabulary"][token] for token in first["tokens"]] == made["tokens"]
    assert first["student"] == pytest.approx(made["student"], abs=0.006) and first["teacher"] == made["teacher"]
    assert first["disagreement"] == pytest.approx(disagreement(made), abs=1e-3)


def test_hours_and_generations_of_a_continued_run_leave_out_the_pause(tmp_path):
    def logged(name: str, steps: range, began: float) -> None:
        with made_run.SummaryWriter(tmp_path / name) as writer:
            for i, step in enumerate(steps):
                at = began + 3600 * (i + 1)
                writer.add_scalar("train/timing/step_total", 3600.0, step, walltime=at)
                writer.add_scalar("train/rollout/num_samples", 8, step, walltime=at)

    logged("z", range(1, 5), 1e9)  # by name it would come last
    logged("a", range(4, 6), 1e9 + 1e6)
    run = read_run("run", str(tmp_path))
    assert run.hours == pytest.approx({1: 1, 2: 2, 3: 3, 4: 4, 5: 5}, abs=1e-3)
    assert run.generations == {1: 8, 2: 16, 3: 24, 4: 32, 5: 40}
    logged("b", range(1, 3), 1e9 + 2e6)  # begun anew, and not as far yet
    assert read_run("run", str(tmp_path)).generations == {1: 8, 2: 16}
    assert len(written(tmp_path, str(tmp_path))[1]["runs"][0]["axes"]["hours"]) == 2


def test_a_clock_that_is_set_back_does_not_turn_time_back(tmp_path):
    with made_run.SummaryWriter(tmp_path) as writer:
        for step, at in enumerate((1e9, 1e9 + 3600, 1e9 - 7200, 1e9 + 5400), 1):
            writer.add_scalar("train/reward", 0.0, step, walltime=at)
    assert list(read_run("run", str(tmp_path)).hours.values()) == pytest.approx([0, 1, 1, 1.5])


def test_thinned_curves_keep_peaks_and_ends():
    curve = [(step, 0.0) for step in range(5_000)]
    curve[1234], curve[4321] = (1234, 9.0), (4321, -9.0)
    kept = thinned(curve, 100)
    assert len(kept) <= 100 and {curve[0], curve[1234], curve[4321], curve[-1]} <= set(kept)
    assert thinned(curve, 5_000) is curve


def test_hostile_text_is_data_in_the_page(tmp_path):
    made_run.record(made_run.log(tmp_path, made_run.curves(3)), [made_run.hostile(1)])
    html, curves, samples = written(tmp_path, f"</title><script>alert(1)</script>\u202e={tmp_path}")
    assert "window.harmed" in html and not re.search("<script>|<img", markup(html))
    assert html.count("</script>") == html.count("<script ") == 6  # four scripts, two blocks of data
    assert not ACTS.search(html.replace("\r", ""))
    texts = [*samples["vocabulary"], samples["runs"][0]["shown"][0]["feedback"], curves["runs"][0]["name"]]
    assert not any(ACTS.search(text) for text in texts) and any("⟨U+202E⟩gnp.exe" in text for text in texts)


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path):
    html, _, _ = written(tmp_path, *made_run.two_runs(tmp_path))
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:|//)|url\(|@import", markup(html))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and policy.count("sha256") == 4
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path, monkeypatch):
    tokens = [f"word{i % 50}" for i in range(100)]
    long = {
        "tokens": tokens, "token_ids": [0] * 100, "in_loss": [True] * 100, "student": [-1.25] * 100,
        "teacher": [-0.75] * 100, "alternatives": [[[f"word{k}", -1.5] for k in range(5)]] * 100,
    }  # fmt: skip
    samples = [made_run.sample(step, number, **long) for step in range(1, 201) for number in range(2)]
    made_run.record(made_run.log(tmp_path, {"train/reward": [(step, step % 7) for step in range(1, 4_001)]}), samples)
    monkeypatch.setattr(page, "MOST_BYTES", 1_000_000)
    html, curves, samples = written(tmp_path, str(tmp_path))
    assert len(html) < 2_200_000
    assert all(len(steps) <= page.MOST_POINTS for steps, _ in curves["runs"][0]["curves"].values())
    assert curves["runs"][0]["longest"] == 4_000
    (run,) = samples["runs"]
    assert run["recorded"] == 400 and run["steps"] == 200 and 50 < len(run["shown"]) < 200
    assert {run["shown"][0]["step"], run["shown"][-1]["step"]} == {1, 200}  # evenly spaced, first and last


def test_a_response_of_100_000_tokens_is_cut_in_the_page(tmp_path):
    many = 100_000
    sample = made_run.sample(
        1, tokens=["y"] * many, in_loss=[True] * many, student=[-1.0] * many, teacher=[-2.0] * many,
        alternatives=[[["z", -1.0]]] * many, response="y" * many, token_ids=[0] * many,
    )  # fmt: skip
    made_run.record(made_run.log(tmp_path, made_run.curves(3)), [sample])
    html, _, samples = written(tmp_path, str(tmp_path))
    (shown,) = samples["runs"][0]["shown"]
    assert shown["length"] == many and len(shown["tokens"]) == len(shown["alternatives"]) == page.MOST_TOKENS
    assert "80,000 more characters in samples.jsonl" in shown["response"] and len(html) < 2_000_000


def test_a_sample_that_nobody_scored_is_shown_without_numbers(tmp_path, printed):
    silent = {"student": [], "teacher": [], "alternatives": [], "active": False, "teacher_prompt": None, "reward": None}
    made_run.record(made_run.log(tmp_path, made_run.curves(3)), [made_run.sample(1, **silent)])
    _, _, samples = written(tmp_path, str(tmp_path))
    assert samples["runs"][0]["shown"][0]["disagreement"] is None
    assert "no reward · no teacher" in printed(str(tmp_path))


@pytest.mark.parametrize("arguments", [["{}"], ["{}/none"], ["a={}", "a={}"], ["{}", "--text"], ["{}", "--step", "1"]])
def test_what_cannot_be_reported_is_one_message(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *(argument.format(tmp_path) for argument in arguments)])
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "report" in said[-1] and "Traceback" not in "".join(said)
    assert not list(tmp_path.iterdir())


def test_a_line_that_is_no_sample_is_named(tmp_path):
    samples = [made_run.sample(1), made_run.sample(2, 7, student=[0.0])]
    made_run.record(made_run.log(tmp_path, made_run.curves(3)), samples)
    with pytest.raises(ConfigError, match=r"samples\.jsonl, step 2, sample 7: not in the format of"):
        written(tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["quickstart/sdpo/tensorboard", "quickstart/grpo/tensorboard"], ["sdpo", "grpo"]),
        (["quickstart/sdpo"], ["sdpo"]), (["quickstart/sdpo/tensorboard"], ["sdpo"]),
        (["mine=quickstart/sdpo", "quickstart/grpo"], ["mine", "grpo"]),
    ],
)  # fmt: skip
def test_runs_are_named_by_their_differences(tmp_path, monkeypatch, runs, names):
    for name in ("sdpo", "grpo"):
        (tmp_path / "quickstart" / name / "tensorboard").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert list(command.named(runs)) == names


def test_what_acts_is_written_by_its_number():
    assert visible("a\u202eb\x1b[0m\x00\ud800\n\tc") == "a⟨U+202E⟩b⟨U+001B⟩[0m⟨U+0000⟩⟨U+D800⟩\n\tc"
    assert visible("Grüße, שלום 👩‍🚀 {{x}} [bold]") == "Grüße, שלום 👩‍🚀 {{x}} [bold]"


def test_levels_show_the_sign():
    assert [level(value) for value in (0.0, 0.09, 0.1, -0.6, 2.0, -9.0)] == [0, 0, 1, -2, 3, -len(LEVELS)]


# --- in the terminal


@pytest.fixture
def printed(capsys, monkeypatch):
    """`printed(*arguments, VARIABLE=value)`: what the command prints with --text, into a pipe."""

    def run(*arguments: str, **environment: str) -> str:
        for name, value in {"COLUMNS": "100", **environment}.items():
            monkeypatch.setenv(name, value)
        command.main([*arguments, "--text"])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recorded")
    samples = [*(made_run.sample(step, number) for step in (1, 7) for number in range(3)), made_run.hostile(8)]
    return str(made_run.record(directory, samples))


def test_the_terminal_shows_a_sample_token_by_token(recorded, printed):
    out = printed(recorded, "--step", "7", "--sample", "2")
    assert "\x1b" not in out  # piped
    assert out.count("where they differ most") == 1 and "step 7, sample 2" in out
    made = made_run.sample(7, 2)
    token, teacher, student = made["tokens"][0], made["teacher"][0], made["student"][0]
    assert f"{token}{{{teacher - student:+.1f}}}" in out
    assert "expected 7043, got" in out and "'7' 98%" in out
    assert printed(recorded, "--step", "7").count("where they differ most") == 3


def test_colours_are_for_terminals_and_obey_no_color(recorded, printed):
    coloured = printed(recorded, "--step", "1", "--sample", "0", FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[4;48;5;" in coloured and "{-" not in coloured  # less likely: underlined as well
    plain = printed(recorded, "--step", "1", "--sample", "0", NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color")
    assert "48;5;" not in plain and "{-" in plain


def test_hostile_text_is_not_obeyed_by_the_terminal(recorded, printed):
    out = printed(recorded)  # the last step's
    assert not ACTS.search(out) and "⟨U+001B⟩[31mred" in out and "⟨U+202E⟩gnp.exe" in out


def test_a_sample_that_was_not_recorded_is_named(recorded):
    with pytest.raises(ConfigError, match="recorded are steps 1 to 8"):
        command.main([recorded, "--text", "--step", "5"])
    with pytest.raises(ConfigError, match="recorded are of step 7 the samples 0, 1, 2"):
        command.main([recorded, "--text", "--step", "7", "--sample", "9"])


def test_truncated_text_has_a_sign_in_its_place_in_terminal_and_page():
    """JavaScript counts an emoji twice, and what could act is written longer than it was."""
    one = made_run.sample(1, teacher_prompt="\U0001f600\x1b ab", truncated_at={"feedback": [3], "solution": []})
    assert terminal.teacher_prompt(one).plain == "\U0001f600\u27e8U+001B\u27e9 [... feedback truncated here ...]ab"
    assert page._places(one["teacher_prompt"], [3, 30_000]) == [len("..") + len("<U+001B>") + 1]
