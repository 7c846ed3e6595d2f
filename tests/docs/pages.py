"""What the Markdown pages under docs, and the files that they include, link to."""

import functools
import itertools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.command_line import ROOT

DOCS = ROOT / "docs"
START = "index"
_OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_TITLED = re.compile(r".*<(?P<page>[^>]+)>")


@functools.cache
def pages() -> frozenset[str]:
    """All pages of the site: paths below docs without the suffix."""
    return frozenset(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md"))


def markdown_files() -> list[Path]:
    """The pages, and what stands beside docs."""
    return sorted(DOCS.rglob("*.md")) + [ROOT / name for name in _OTHERS]


def reachable() -> set[str]:
    """The pages that tables of contents lead to from the first one."""
    found, waiting = set(), [START]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            waiting += _contents(page)
    return found


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """Where a file's relative links and pictures lead: a path, and an anchor there or an empty string."""
    for token in _tokens(path):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if target and not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            yield (path.parent / name).resolve() if name else path, anchor


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to a file's headings."""
    tokens = _parsed(path)
    titles = [text for opening, text in itertools.pairwise(tokens) if opening.type == "heading_open"]
    plain = ("".join(child.content for child in title.children or ()) for title in titles)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in plain}


def _contents(page: str) -> Iterator[str]:
    for token in _parsed(DOCS / f"{page}.md"):
        if token.type == "fence" and token.info.strip() == "{toctree}":
            entries = (line.strip() for line in token.content.splitlines() if line.strip() and line[0] != ":")
            for entry in entries:
                titled = _TITLED.fullmatch(entry)
                name = (Path(page).parent / (titled["page"] if titled else entry)).as_posix()
                # As in Sphinx, a star stands for anything within a folder.
                yield from (one for one in pages() if one.count("/") == name.count("/") and fnmatchcase(one, name))


@functools.cache
def _parsed(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def _tokens(path: Path) -> Iterator[Token]:
    for token in _parsed(path):
        yield from token.children or ()
