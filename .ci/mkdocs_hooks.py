"""MkDocs hooks: what pages show in a Git browser, the site shows too.

- Files outside docs/ that a page links to become pages. A link that is named after a file gets the page's title.
- Formulas, written as GitHub has them, become MathML, which browsers render without a script.
- Listings that begin with a command are highlighted as shell.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_FORMULA = re.compile(r"\$`([^`]+)`\$")
COMMAND = re.compile(r"^```\n(?=(?:\$ )?(?:\w+=\S+ )?(?:make|pip|python|openrlhf-sdpo|ray|git|source) )")
CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])(--[a-z][\w.-]*\w)(?![^<]*>)")
CHANGELOG = "CHANGELOG.md"
STYLE = """
.md-typeset h1, .md-typeset h2 { font-weight: 500; color: var(--md-default-fg-color) }
.md-typeset table:not([class]) td:nth-child(-n+2) code { word-break: normal; overflow-wrap: normal }
@media screen and (max-width: 44rem) {
  .md-typeset table:not([class]) th { min-width: 3rem }
  .md-typeset table:not([class]) :is(th, td) { padding: .5em .6em }
  .md-typeset table:not([class]) td:last-child { min-width: 9rem }
}
.md-typeset img { max-width: min(100%, 36rem); display: block; margin: auto }
.md-typeset pre > code { white-space: pre-wrap; overflow-wrap: anywhere }
.md-typeset code .flag { white-space: nowrap }
.md-typeset .language-text pre > code { white-space: pre; overflow-wrap: normal }
.md-typeset math[display=block] { display: block; overflow-x: auto; overflow-y: hidden; margin: .8em 0 }
.md-typeset .doc-contents { padding-left: .8rem; border-left: .05rem solid var(--md-default-fg-color--lightest) }
"""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
NAMED_LINK = re.compile(r"\[([\w./-]+\.md)\](?=\((?!\w+:|#)([^)\s#]+))")
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.extra_css.append("assets/pages.css")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the style, and a page for each file outside docs/ that a page links to.

    Markdown is shown as it is, other text as a listing.
    """
    files.append(File.generated(config, "assets/pages.css", content=STYLE))
    todo = [CHANGELOG, *(f"{DOCS}/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(todo)
    files.append(File.generated(config, CHANGELOG, content=(ROOT / CHANGELOG).read_text()))
    while todo:
        page = todo.pop()
        for path in outside(page, (ROOT / page).read_text()):
            if path in seen:
                continue
            seen.add(path)
            text = (ROOT / path).read_text()
            if path.endswith(".md"):
                todo.append(path)
            else:
                language = LANGUAGES.get(Path(path).suffix, "")
                text = f"# {path}\n\n```{language}\n{text.rstrip()}\n```\n"
            files.append(File.generated(config, name_on_site(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages that `on_files` made."""
    here = page.file.src_uri
    # In the repository. A listing, whose name differs there, has no links.
    path = here if page.file.generated_by is not None else f"{DOCS}/{here}"

    def local(link: re.Match[str]) -> str:
        target = repository_path(path, link[1])
        there = target.removeprefix(f"{DOCS}/") if target.startswith(f"{DOCS}/") else name_on_site(target)
        return posixpath.relpath(there, posixpath.dirname(here) or ".")

    def titled(link: re.Match[str]) -> str:
        target = ROOT / repository_path(path, link[2])
        title = TITLE.search(target.read_text()) if target.is_file() else None  # MkDocs warns of a broken link
        return f"[{title[1]}]" if title else link[0]

    parts = FENCE.split(markdown)
    kept = FENCE.findall(markdown)
    return "".join(
        INLINE_FORMULA.sub(inline_formula, LINK.sub(local, NAMED_LINK.sub(titled, part))) + as_shown(fence)
        for part, fence in zip(parts, [*kept, ""], strict=True)
    )


def inline_formula(formula: re.Match[str]) -> str:
    return f"<span>{convert(formula[1])}</span>"  # else Markdown takes a formula at the start of a line for a block


def as_shown(fence: str) -> str:
    """A formula as MathML, a listing without a language as shell or text."""
    if formula := FORMULA.fullmatch(fence):
        return convert(" ".join(formula[1].split()), display="block")
    fence = COMMAND.sub("```bash\n", fence)
    return f"```text{fence[3:]}" if fence.startswith("```\n") else fence


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Where a line is broken in a flag, it is after a dot; browsers alone break it after a hyphen."""

    def parts(flag: re.Match[str]) -> str:
        return "<wbr>".join(f'<span class="flag">{part}</span>' for part in re.split(r"(?<=\.)", flag[1]))

    return CODE.sub(lambda code: FLAG.sub(parts, code[0]), html)


def outside(page: str, text: str) -> Iterator[str]:
    """Paths in the repository of the files outside docs/ that `page` links to."""
    for link in LINK.findall(FENCE.sub("", text)):
        path = repository_path(page, link)
        if not path.startswith(f"{DOCS}/"):
            if not (ROOT / path).is_file():
                raise PluginError(f"{page} links to {link}: there is no such file in the repository")
            yield path


def repository_path(page: str, link: str) -> str:
    """Of what `page` links to; a folder stands for its README, as in a Git browser."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    path = f"{path}/README.md" if (ROOT / path).is_dir() else path
    return f"{DOCS}/index.md" if path == "README.md" else path  # the repository's first page and the site's


def name_on_site(path: str) -> str:
    """The source name of the page that shows a file outside docs/."""
    return path if path.endswith(".md") else f"{path}.md"
