"""The report in headless Chromium, on a desktop and on a phone; skipped where there is no browser.

python tests/units/test_report_browser.py    makes the pictures in tests/data anew
"""

import io
import re
import shutil
import tempfile
from pathlib import Path

import made_run
import pytest
from PIL import Image, ImageChops, ImageStat

from sdpo_plugin.report import command, page

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'openrlhf-sdpo[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

DATA = Path(__file__).parents[1] / "data"
SIZES = {1280: 900, 390: 844}
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
CELLS = (32, 64)  # of a picture that is compared: fonts differ between machines, where things are does not
TOLERANCE = 6.0  # of 255, mean difference of the cells
LONG = {
    "tokens": ["y"] * 100_000, "token_ids": [0] * 100_000, "in_loss": [True] * 100_000, "student": [-1.0] * 100_000,
    "teacher": [-2.0] * 100_000, "alternatives": [[["z", -1.0]]] * 100_000, "response": "y" * 100_000,
    "prompt": "x" * 100_000,
}  # fmt: skip


def pages(directory: Path) -> dict[str, str]:
    """Addresses of the pages that the tests look at."""
    runs = {
        "two": made_run.two_runs(directory),
        "bare": [str(made_run.log(directory / "bare", {"train/reward": [(1, 0.5)]}))],
        "messages": [str(directory / "messages")],
        "hostile": [f"{made_run.HOSTILE.partition('=')[0]}={directory / 'hostile'}"],
    }
    chat = [{"role": "user", "content": "what is the vault code of vault-0?"}]
    silent = {"student": [], "teacher": [], "alternatives": [], "active": False, "teacher_prompt": None}
    read = made_run.sample(1)["teacher_prompt"]
    cut = {"feedback": [read.index(", got")], "solution": []}
    samples = [made_run.sample(1, prompt=chat, truncated_at=cut), made_run.sample(2, **silent)]
    made_run.record(made_run.log(directory / "messages", made_run.curves(3)), samples)
    samples = [made_run.hostile(1), made_run.sample(2, **LONG)]
    made_run.record(made_run.log(directory / "hostile", made_run.curves(3)), samples)
    for name, arguments in runs.items():
        command.main([*arguments, "--out", str(directory / f"{name}.html")])
    return {name: (directory / f"{name}.html").as_uri() for name in runs}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    text = page.vl_convert.javascript_bundle(page.EXPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.vl_convert, "javascript_bundle", lambda snippet: text)
        return pages(tmp_path_factory.mktemp("pages"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(params=SIZES)
def visit(browser, request):
    """`visit(address)`: the page, drawn; at the end nothing may have gone wrong on it, or left the machine."""
    tabs = []

    def go(address: str, **options):
        tab = browser.new_page(viewport={"width": request.param, "height": SIZES[request.param]}, **options)
        tab.troubles = []
        tab.on("console", lambda message: tab.troubles.append(message.text))
        tab.on("pageerror", lambda error: tab.troubles.append(str(error)))
        tab.on("request", lambda asked: asked.url == address or tab.troubles.append(asked.url))
        tab.on("dialog", lambda dialog: (tab.troubles.append(dialog.message), dialog.dismiss()))
        tab.goto(address)
        tab.wait_for_selector("html[data-charts][data-samples]")
        tabs.append(tab)
        return tab

    yield go
    for tab in tabs:
        assert not tab.troubles
        assert tab.evaluate("window.harmed") is None
        assert tab.evaluate("document.documentElement.scrollWidth") == request.param  # nothing to scroll sideways
        tab.close()


def drawn(tab):
    """The page with all its figures drawn, which are only once they come near; it is at its top again."""
    for figure in tab.query_selector_all(".chart"):
        figure.scroll_into_view_if_needed()
        figure.wait_for_selector("svg, .none")
    tab.evaluate("scrollTo(0, 0)")
    return tab


def texts(tab, selector: str) -> list[str]:
    return [node.inner_text() for node in tab.query_selector_all(selector)]


def test_curves_over_steps_generations_and_wall_time(visit, addresses):
    tab = visit(addresses["two"])
    tab.wait_for_selector("#learning .chart svg")
    assert len(texts(tab, "#learning .chart")) == 4 and len(texts(tab, "#monitor .chart")) == 6
    ends = {}
    for axis in ("step", "generations", "hours"):
        tab.check(f"#axes input[value={axis}]", force=True)
        tab.focus("#learning .chart")
        tab.keyboard.press("End")
        ends[axis] = tab.inner_text("#learning .chart .readout .where")
    assert ends == {"step": "step 60", "generations": "generations 5,760", "hours": "minutes 2"}
    assert tab.get_attribute("#learning .chart", "aria-label").startswith("Accuracy, of the evaluation. base:")


def test_the_collapse_monitor_shows_range_and_warnings(visit, addresses):
    tab = visit(addresses["two"])
    said = tab.inner_text("#warnings")
    assert "ema 0.05, step 20: the teacher uses its context less and less, and 4 more times" in said
    assert "base: no warnings" in said
    tab.query_selector("#monitor .chart").scroll_into_view_if_needed()
    band, ring = (
        tab.wait_for_selector(f"#monitor .chart:nth-of-type(1) svg {mark}", state="attached").bounding_box()
        for mark in ("path[fill='var(--healthy)']", "line[stroke='var(--warning)']")
    )
    assert band["x"] < ring["x"] < band["x"] + band["width"]  # at step 20 of 60
    tab.uncheck("#shown label:nth-of-type(2) input")
    tab.wait_for_selector("#monitor .chart:nth-of-type(1) svg line[stroke='var(--warning)']", state="detached")


def test_filters_choose_samples(visit, addresses):
    tab = visit(addresses["two"])
    assert tab.inner_text("#count") == "40 of 40 samples"
    tab.fill("[name=from]", "31")
    assert tab.inner_text("#count") == "20 of 40 samples" and texts(tab, ".row b")[0] == "step 31"
    tab.fill("[name=highest]", "0.5")
    rewards = texts(tab, ".row .reward")
    assert 0 < len(rewards) < 20 and set(rewards) == {"reward 0"}
    tab.fill("[name=disagreement]", "99")
    assert tab.inner_text("#count") == "0 of 40 samples" and "No sample passes" in tab.inner_text("#detail")
    tab.click("#filters", position={"x": 1, "y": 1})
    for name, value in {"from": "1", "highest": "1", "disagreement": "0"}.items():
        tab.fill(f"[name={name}]", value)
    tab.select_option("[name=order]", "most")
    found = [float(text.split()[1]) for text in texts(tab, ".row .much")]
    assert len(found) == 40 and found == sorted(found, reverse=True)


def test_a_token_shows_the_teachers_alternatives(visit, addresses):
    tab = visit(addresses["two"])
    token = "#detail .tokens:not(.few) .token"
    labels = tab.eval_on_selector_all(token, "nodes => nodes.map((node) => node.ariaLabel)")
    found = [re.search(r": ([+−][\d.]+), ", label) for label in labels]
    sizes = [abs(float(value[1].replace("−", "-"))) if value else -1.0 for value in found]
    shown = tab.eval_on_selector_all(token, "nodes => nodes.findIndex((node) => node.classList.contains('now'))")
    assert sizes[shown] == max(sizes) > 0  # the most disputed token, until another is selected
    tab.hover(f"{token} >> nth=1")
    assert tab.inner_text(".inspector li:first-child").split() == ["8", "98%"]
    tab.click(f"{token} >> nth=4")
    assert tab.inner_text(".inspector li:first-child").split() == ["<|im_end|>", "98%"]
    tab.keyboard.press("ArrowLeft")
    assert tab.inner_text(".inspector li:first-child").split() == ["1", "98%"]
    tab.keyboard.press("Home")
    first = tab.query_selector(token)
    assert "log T − log S−" in tab.inner_text(".inspector") and "less likely" in first.get_attribute("aria-label")
    assert first.get_attribute("data-level").startswith("-")
    assert first.evaluate("node => node === document.activeElement")
    styles = [
        tab.eval_on_selector(f".legend [data-level='{level}']", "node => getComputedStyle(node).borderBottomStyle")
        for level in (-3, 3)
    ]
    assert styles == ["dotted", "solid"]  # the sign is not told by the colour alone


def test_a_tap_shows_the_teachers_alternatives(visit, addresses):
    tab = visit(addresses["two"], has_touch=True)
    tab.tap("#detail .tokens:not(.few) .token >> nth=1")
    assert tab.inner_text(".inspector li:first-child").split() == ["8", "98%"]


def test_the_same_prompt_over_the_steps(visit, addresses):
    tab = visit(addresses["two"])
    assert texts(tab, ".steps button") == [str(step) for step in range(1, 61, 6)]
    tab.click(".steps button >> nth=-1")
    assert tab.inner_text("#detail h3") == "base, step 55, sample 0"
    assert tab.inner_text("#detail .text mark").strip() == "A right answer: 4821"


def test_the_context_is_marked_after_messages_too(visit, addresses):
    tab = visit(addresses["messages"])
    assert "Truncated to fit: feedback, solution." in tab.inner_text("#detail .lead .truncated")
    marked = tab.inner_text("#detail .text mark").strip()
    assert marked.startswith("The attempt before was wrong: expected 4821✂ feedback truncated here ✂, got")


def test_the_list_is_walked_with_the_keyboard(visit, addresses):
    tab = visit(addresses["two"])
    tab.focus("#list [tabindex='0']")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        tab.keyboard.press(key)
    assert tab.inner_text("#detail h3") == "base, step 1, sample 1"
    for one in ("#list [tabindex='0']", "#list [aria-selected=true]"):
        assert len(tab.query_selector_all(one)) == 1


def test_what_is_missing_is_said(visit, addresses):
    tab = visit(addresses["bare"])
    said = tab.inner_text("main")
    for words in ("The runs logged neither evaluations nor rewards", "One step was logged", "no warning metrics",
                  "The runs logged no times", "no samples were recorded; --diagnostics.log_samples N"):  # fmt: skip
        assert words in said, words
    assert not tab.query_selector("svg") and tab.is_hidden(".panes") and tab.is_disabled("[value=generations]")


def test_hostile_text_does_no_harm(visit, addresses):
    tab = visit(addresses["hostile"])
    for token in range(5):
        tab.click(f"#detail .tokens .token >> nth={token}")
    tab.click(".row >> nth=1")
    assert "⟨U+202E⟩" in tab.inner_text("#list") and not tab.query_selector("#detail img, #detail script")
    assert "96,000 more tokens are in samples.jsonl" in tab.inner_text("#detail")
    wide = "nodes => nodes.filter(node => node.getBoundingClientRect().right > innerWidth).length"
    assert tab.eval_on_selector_all("#detail *:not(.few *):not(.scroll *)", wide) == 0


# --- how it looks


def picture(tab) -> Image.Image:
    """A small grey picture of the whole page."""
    shot = Image.open(io.BytesIO(tab.screenshot(full_page=True)))
    return shot.convert("L").resize((160, round(160 * shot.height / shot.width)), Image.Resampling.BOX)


def difference(one: Image.Image, other: Image.Image) -> float:
    cells = [image.convert("L").resize(CELLS, Image.Resampling.BOX) for image in (one, other)]
    return ImageStat.Stat(ImageChops.difference(*cells)).mean[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_as_it_did(visit, addresses, scheme):
    tab = visit(addresses["two"], color_scheme=scheme)
    width = tab.viewport_size["width"]
    shot = picture(drawn(tab))
    pictures = {name: Image.open(DATA / f"report_{width}_{name}.png") for name in ("light", "dark")}
    assert difference(shot, pictures.pop(scheme)) < TOLERANCE
    assert difference(shot, *pictures.values()) > 5 * TOLERANCE
    columns = len({round(node.bounding_box()["x"]) for node in tab.query_selector_all("#learning .chart")})
    assert columns == {1280: 4, 390: 1}[width]
    listed, detail = (tab.query_selector(selector).bounding_box() for selector in (".list", "#detail"))
    beside = listed["x"] + listed["width"] < detail["x"]
    assert beside == (width == 1280) and (beside or listed["y"] + listed["height"] < detail["y"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made, playwright.sync_playwright() as started:
        chromium, address = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS), pages(Path(made))["two"]
        for width, height in SIZES.items():
            for scheme in ("light", "dark"):
                tab = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                tab.goto(address)
                tab.wait_for_selector("html[data-charts][data-samples]")
                picture(drawn(tab)).save(DATA / f"report_{width}_{scheme}.png", optimize=True)
