"""MkDocs hooks: what pages link to outside docs/ is part of the site, so that links work there as in a Git browser."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml"}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
STYLE = """
.md-typeset table:not([class]) td:first-child code { word-break: normal; overflow-wrap: normal }
.md-typeset img { max-width: min(100%, 27rem); display: block; margin: auto }
"""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.extra_css.append("assets/pages.css")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the style, and a page for each file outside docs/ that a page links to.

    Markdown is shown as it is, other text as a listing.
    """
    files.append(File.generated(config, "assets/pages.css", content=STYLE))
    todo = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(todo)
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

    parts = FENCE.split(markdown)
    kept = FENCE.findall(markdown)
    return "".join(LINK.sub(local, part) + fence for part, fence in zip(parts, [*kept, ""], strict=True))


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
