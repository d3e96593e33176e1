"""The pages of docs/: as a site, in a Git browser, and against the code that they describe."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from documented import DOCS, FENCE, PAGES, ROOT, commands, first_cells, inline, modules, where

from sdpo_plugin import plugins
from sdpo_plugin.config import GROUPS, RepromptConfig, RewardConfig
from sdpo_plugin.distillation.context import context_metrics
from sdpo_plugin.monitoring.collapse import WARNING, length_metrics
from sdpo_plugin.openrlhf_adapter import failures
from sdpo_plugin.openrlhf_adapter.launcher import cli

SOURCES = [path for path in (ROOT / "sdpo_plugin").rglob("*.py") if "testing" not in path.parts]
OPENRLHF = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])

# ── as a site ──


class Html(HTMLParser):
    """Ids, links, and what a browser loads by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(found["href"])
        self.loaded += [found[key] for key in ("src", "srcset", "poster", "data") if found.get(key) and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it: every warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / ".ci/mkdocs.yml", "-d", directory]
    ran = subprocess.run(build, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return directory


@pytest.fixture(scope="module")
def built(site) -> dict[Path, Html]:
    return {path: Html(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_in_the_menu_or_on_the_page_of_results(site, built):
    menu = {link.partition("#")[0] for link in built[site / "index.html"].links}
    evidence = {link.partition("#")[0] for link in built[site / "results.html"].links}
    pages = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.rglob("*.md")}
    assert pages - {"index.html"} <= menu | evidence
    assert 20 <= len(pages & menu) <= 30


def test_links_have_titles(built):
    """The text of a link is what the page is called, not its file's name."""
    named = re.compile(r"<a [^>]*>([\w./-]+\.md)</a>")
    assert {page.name: found for page in built if (found := named.findall(page.read_text()))} == {}


def test_commands_are_highlighted_and_formulas_need_no_script(site):
    page = (site / "loss.html").read_text()
    assert page.count("<math") > 20 and "$`" not in page and "language-math" not in page
    assert 'class="language-bash' in (site / "install.html").read_text()
    assert "language-bash" in (site / "data.html").read_text()  # a listing without a language


def test_links_and_anchors_lead_somewhere(site, built):
    broken = []
    for page, html in built.items():
        for link in [*html.links, *html.loaded]:
            at = urlsplit(link)
            if at.scheme or at.netloc:
                continue
            target = (page.parent / unquote(at.path)).resolve() if at.path else page
            target = target / "index.html" if target.is_dir() else target
            known = built[target].ids if target in built else set()
            if not target.exists() or (at.fragment and unquote(at.fragment) not in known):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken
    assert sum(len(html.links) for html in built.values()) > 1000


def test_what_is_outside_docs_is_part_of_the_site(site, built):
    assert "recipes/gsm8k/index.html" in built[site / "recipes.html"].links
    source = (site / "sdpo_plugin/algorithms/teacher.py.html").read_text()
    assert "class TrustRegionTeacher" in re.sub("<[^>]+>", "", source)


def test_nothing_is_loaded_from_elsewhere(site, built):
    for html in built.values():
        assert [url for url in html.loaded if urlsplit(url).scheme not in ("", "data") or url.startswith("//")] == []
    assert len(list(site.rglob("*.css"))) >= 2
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s*)['\"]?(?:https?:)?//", style.read_text()), style
    assert not any('class="mermaid"' in page.read_text() for page in built)  # its script would come from elsewhere


# ── in a Git browser ──


def slugs(page: Path) -> set[str]:
    """Anchors that a Git browser makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    bare = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in bare}


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_links_lead_somewhere_in_the_repository(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_the_picture_is_well_formed_and_says_what_it_shows():
    from xml.etree import ElementTree

    picture = ElementTree.parse(DOCS / "data_way.svg").getroot()
    tags = {child.tag.rpartition("}")[2]: child for child in picture}
    assert len(tags["desc"].text) > 200 and "prefers-color-scheme: dark" in tags["style"].text


# ── metrics ──


def text_of(node: ast.AST) -> str | None:
    """A string expression with … for what is not constant; None for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) or "…" for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return "…"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        prefix = isinstance(node.left, ast.Name) and node.left.id == "PREFIX"
        left = "self_distillation/" if prefix else left
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


@cache
def texts() -> list[str]:
    """Every string expression of the package."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    return [text for node in nodes if (text := text_of(node)) is not None]


def logged() -> set[str]:
    """The metrics of this package, by its source."""
    found = {text for text in texts() if re.fullmatch(r"(self_distillation|teacher)/[\w…]+", text)}
    made = {text for text in found if "…" in text}
    assert made == {"self_distillation/…", "self_distillation/…_fraction"}, "look at what makes these names, below"
    sample = SimpleNamespace(action_mask=torch.ones(1, 3), truncated=False)
    found |= length_metrics([sample]).keys() | context_metrics([], [], RepromptConfig()).keys()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and getattr(node.value, "attr", "") == "metrics":
                found |= {text_of(node.slice)} - {None}
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_counted":
                found.add(WARNING + node.args[0].value.replace(" ", "_"))
    return found - made - {"self_distillation/collapse_monitor"}  # a key of the checkpoint


METRICS = (DOCS / "metrics.md").read_text()
NAMED = {metric for cell in first_cells(METRICS) for metric in re.findall(r"`([\w/]+)`", cell)}


def test_the_page_names_the_metrics_that_are_logged_and_no_others():
    of_rollout = ("rollout/reward_skipped", "rollout/turn_limit", "rollout/token_limit")
    prefixes = ("self_distillation/", "teacher/", "timing/teacher_score", *of_rollout, WARNING)
    ours = {metric for metric in NAMED if metric.startswith(prefixes)}
    assert ours == logged()


def test_openrlhf_s_metrics_on_the_page_are_in_openrlhf():
    source = "".join(path.read_text() for path in [*OPENRLHF.glob("trainer/**/*.py"), *OPENRLHF.glob("cli/*.py")])
    for metric in NAMED - logged():
        pattern = re.escape(metric).replace("NAME", r"\{ds\}").replace("passN", r"pass\{n_samples_per_prompt\}")
        last = metric.rpartition("/")[2] if metric in ("return", "response_length", "total_length") else pattern
        assert re.search(rf"(?<![\w/]){last}(?!\w)", source), metric


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_the_metrics_of_a_page_are_logged(page):
    named = set(re.findall(r"`((?:self_distillation|teacher|warning)/\w+)`", FENCE.sub("", page.read_text())))
    assert named <= logged()


# ── names of the code ──


@cache
def identifiers() -> set[str]:
    """Every class, function, attribute and argument of the package, its tests and scripts, and the pages' listings."""
    folders = ("sdpo_plugin", "tests", "recipes")
    sources = [path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    sources += [listing for page in DOCS.rglob("*.md") for listing in modules(str(page.relative_to(DOCS))).values()]
    return {word for text in sources for word in re.findall(r"[A-Za-z_]\w*", text)}


@cache
def of_openrlhf() -> set[str]:
    return {word for path in OPENRLHF.rglob("*.py") for word in re.findall(r"[A-Z]\w+", path.read_text())}


THEIRS = {"MistralCommonBackend", "SDPOTrainer", "SDFTTrainer", "DistillationTrainer", "RayJob"}  # of other libraries


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_the_names_of_a_page_are_in_the_code(page):
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
    classes = {span for span in spans if re.fullmatch(r"[A-Z][a-z]+\w*[A-Z]\w*", span)}
    assert classes <= identifiers() | of_openrlhf() | THEIRS
    hooks = {span for span in spans if re.fullmatch(r"openrlhf_\w+(\(.*\))?", span)}
    assert {hook.partition("(")[0] for hook in hooks} <= identifiers()
    dotted = {span.partition("(")[0] for span in spans if re.match(r"(batch|micro_batch|worker|tokens)\.\w+", span)}
    assert {name for name in dotted if name.rpartition(".")[2] not in identifiers()} == set()
    for span in spans:
        if re.fullmatch(r"sdpo_plugin(\.\w+)+(\(\))?", span):
            module, _, name = span.removesuffix("()").rpartition(".")
            assert hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}"), span
        if re.fullmatch(r"(sdpo_plugin|tests|recipes|docs|\.ci)/[\w./-]+", span):
            assert (ROOT / span).exists(), span


def test_the_defaults_of_the_algorithms_are_those_of_the_code():
    """The table of algorithms.md: what `--algo` changes, and nothing else."""
    text = (DOCS / "algorithms.md").read_text().partition("## Defaults per algorithm")[2]
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    table = {row[0].strip("`-"): row[1:] for row in rows if len(row) == len(header)}
    offered = plugins.algorithms(plugins.load()[0])
    general = {f"{group.prefix}.{field.name}": field.default for group in GROUPS for field in dataclasses.fields(group)}
    assert {name.strip("`") for name in header[1:-1]} == offered.keys()
    for k, name in enumerate(header[1:-1]):
        changed = {key: value for key, value in offered[name.strip("`")].defaults.items() if "template" not in key}
        assert changed.keys() <= table.keys()
        stated = {key: cells[k] for key, cells in table.items() if cells[k] != "–"}
        assert stated == {key: str(value) for key, value in changed.items()}
    assert all(str(general[key]) == cells[-1] for key, cells in table.items() if key in general)


# ── messages ──

TROUBLES = (DOCS / "troubleshooting.md").read_text()
MESSAGES = [m for cell in first_cells(TROUBLES.partition("## By symptom")[0]) for m in re.findall(r"`([^`]+)`", cell)]


@cache
def said() -> list[str]:
    return [re.sub("…+", "…", " ".join(text.split())) for text in texts()]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_that_the_code_says(message):
    assert any(message in text for text in said())


def test_every_warning_of_the_collapse_monitor_is_on_the_page():
    tree = ast.parse((ROOT / "sdpo_plugin/monitoring/collapse.py").read_text())
    warnings = [
        " ".join((text_of(node.args[2]) or "").split())
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_counted"
    ]
    assert len(warnings) == 6
    assert [warning for warning in warnings if not any(message in warning for message in MESSAGES)] == []


def test_the_exit_codes_are_those_of_the_code():
    row = re.compile(r"^\| (\d+) \| (.+?) \|$", re.MULTILINE)
    found = {int(code): meaning for code, meaning in row.findall((DOCS / "cli.md").read_text())}
    assert found == failures.EXIT_CODES
    assert {int(code) for code, _ in row.findall(TROUBLES)} == found.keys() - {130}


# ── flags and commands ──

ADDED = re.compile(r"(?:add_argument\(\s*|^ +)f?\"(--[\w.{}-]+)\"", re.MULTILINE)


@cache
def flags() -> set[str]:
    """Every flag of OpenRLHF, this package, its scripts, and the plugins on the pages."""
    scripts = [*(ROOT / "tests/slow").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), *SOURCES]
    found = {flag for path in [OPENRLHF / "cli/train_ppo_ray.py", *scripts] for flag in ADDED.findall(path.read_text())}
    found |= {flag.replace("{prefix}", model) for flag in found for model in ("actor", "critic")}  # of each optimizer
    manager, parser = plugins.load()[0], argparse.ArgumentParser()
    manager.hook.openrlhf_add_arguments(parser=parser)
    found |= set(parser._option_string_actions)
    groups = [RewardConfig, *(group for one in plugins.algorithms(manager).values() for group in one.options)]
    for group in groups:
        names = [f"{group.prefix}.{field.name}" for field in dataclasses.fields(group)]
        found |= {f"--{name}" for name in names} | {f"--no-{name}" for name in names}
    for page in DOCS.rglob("*.md"):
        for listing in modules(str(page.relative_to(DOCS))).values():
            found |= set(ADDED.findall(listing))
            prefix = re.search(r'^    prefix = "(\w+)"', listing, re.MULTILINE)
            for field in re.findall(r"(\w+): \w+ = option\(", listing) if prefix else ():
                found.add(f"--{prefix[1]}.{field}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_the_flags_of_a_page_exist(page):
    text = page.read_text()
    dotted = set(re.findall(r"--(?:no-)?[a-z_]+\.[\w.]*\w", text))
    groups = set(re.findall(r"(--[a-z_]+\.[\w.]*?)\*", text))
    groups |= {f"{name}." for name in re.findall(r"^#+ (--[\w.]+)$", text, re.MULTILINE)}
    ours = [c for c in [*commands(page), *inline(page)] if c.startswith(("openrlhf-sdpo", "python -m openrlhf"))]
    of_commands = {flag for command in ours for flag in re.findall(r"(?<!\S)--[\w.-]+", command)}
    starts = {group.rstrip("_.") for group in groups}
    known = flags() | {"--my.rate"}  # a plugin that is not shown
    unknown = {f for f in dotted | of_commands if f not in known and f.rstrip("_.") not in starts}
    assert unknown == set()
    assert [group for group in groups if not any(flag.startswith(group) for flag in flags())] == []


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_the_commands_of_a_page_name_what_is_there(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command in [*commands(page), *inline(page)]:
        program, first, *rest = [*command.split(" "), ""]
        if program == "make":
            assert first in targets, command
        elif program == "openrlhf-sdpo":
            assert first in cli.COMMANDS or first in ("--help", "--version"), command
        elif program == "python" and first == "-m":
            assert importlib.util.find_spec(rest[0]), command
        elif program == "python" and "/" in first:
            assert (ROOT / first).exists(), command
        elif program == "pip" and first == "install":
            named = ",".join(re.findall(r"(?<!openrlhf)\[([\w,]+)\]", command))
            assert set(named.split(",")) - {""} <= set(extras), command


def test_the_defaults_on_the_page_for_newcomers_are_ours():
    """`--flag` (value): that is ours; `name` (value) | `--flag`: ours is the same."""
    defaults = {
        f"--{group.prefix}.{field.name}": str(field.default) for group in GROUPS for field in dataclasses.fields(group)
    }
    row = re.compile(r"^\| `[\w.]+`(?: \(`?([^`()]+)`?\))? \| `(--[\w.]+)`(?: \(`?([\w.-]+)`?\))? \|", re.MULTILINE)
    compared = 0
    for theirs, flag, ours in row.findall((DOCS / "coming-from.md").read_text()):
        if flag in defaults and (stated := ours or theirs):
            same = {stated, f"{stated}.0", stated.replace(".0", "")}
            assert defaults[flag] in same, (flag, stated)
            compared += 1
    assert compared > 30


# ── listings ──


def test_the_reward_function_of_the_first_page_says_what_it_is_said_to_say():
    found: dict = {}
    listing = next(text for kind, text in FENCE.findall((ROOT / "README.md").read_text()) if kind == "python")
    exec(listing, found)
    asked = [found["reward_func"]([f"Q?{answer}"], ["Q?"], ["10"]) for answer in ("It has 9", "10", "many")]
    assert [answer["rewards"].item() for answer in asked] == [0.0, 1.0, 0.0]
    assert [answer["feedback"] for answer in asked] == [
        ["The answer is 10, you gave 9."], [None], ["The answer is 10, you gave no number."]
    ]  # fmt: skip


def test_the_reward_function_of_the_data_page_says_what_it_is_said_to_say():
    found: dict = {}
    exec(modules("data.md")["reward"], found)
    asked = [found["reward_func"]([f"Q?{answer}"], ["Q?"], ["10"]) for answer in ("It has 9", "10", "many")]
    assert [answer["rewards"].item() for answer in asked] == [0.0, 1.0, 0.0]
    assert [answer["feedback"] for answer in asked] == [
        ["9 is wrong, it has 10 letters."], [None], ["The answer has no number in it."]
    ]  # fmt: skip


def test_the_tutorial_s_files_do_what_it_says(tmp_path, monkeypatch, capsys):
    files = modules("tutorial.md")
    for file, text in files.items():
        (tmp_path / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    tests = vars(importlib.import_module("test_corrections"))
    found = [test for name, test in tests.items() if name.startswith("test_")]
    assert len(found) == 2
    for test in found:
        test()
    expected = re.search(r"ends with\n\n```\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)[1]
    cli.show_plugins(["--plugins", "first", "corrections"])
    assert capsys.readouterr().out.endswith(expected.replace("corrections (", "first (") + expected)
    assert len(files["corrections"].strip().splitlines()) <= 35
