"""The Markdown pages hang together, on GitHub as in the site; quick, because nothing is built."""

from pathlib import Path

import pytest

pytest.importorskip("markdown_it", reason="the extra `docs` is not installed")

from tests.command_line import ROOT
from tests.docs.pages import anchors, links, markdown_files, pages, reachable


def test_every_page_is_in_a_table_of_contents() -> None:
    assert reachable() == pages()


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = [
        f"{target.relative_to(ROOT)}#{anchor}"
        for target, anchor in links(path)
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target))
    ]
    assert not broken
