"""Every block and command of the Markdown pages runs, or is checked as far as it can be."""

import functools
from pathlib import Path

import pytest

from tests.command_line import ROOT
from tests.docs.blocks import Block, PageError, is_slow, read_blocks, read_commands
from tests.docs.checking import check_syntax, shell_text
from tests.docs.pages import markdown_files
from tests.docs.parsing import wrong_with
from tests.docs.running import run_blocks

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in markdown_files()}


@functools.cache
def blocks_of(page: str) -> list[Block]:
    return read_blocks(page, PAGES[page])


def _pages_that_run() -> list[object]:
    """Those with blocks to run; one that cannot be read is among them."""
    found: list[object] = []
    for page in PAGES:
        try:
            blocks = blocks_of(page)
        except PageError:
            continue  # `test_the_blocks_of_a_page_are_well_formed` says why
        if any(block.is_run for block in blocks):
            found.append(pytest.param(page, marks=[pytest.mark.slow] if is_slow(blocks) else []))
    return found


def _commands() -> list[tuple[str, str]]:
    """All commands, of blocks and of sentences, and where they stand."""
    found: list[tuple[str, str]] = []
    for page, content in PAGES.items():
        found += [(block.place, text) for block in blocks_of(page) if (text := shell_text(block))]
        found += read_commands(page, content)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_are_well_formed(page: str) -> None:
    for block in blocks_of(page):
        check_syntax(block)


def test_the_real_parsers_take_every_command() -> None:
    places, texts = zip(*_commands(), strict=True)
    assert [f"{place}: {wrong}" for place, wrong in zip(places, wrong_with(texts), strict=True) if wrong] == []


@pytest.mark.parametrize("page", _pages_that_run())
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    run_blocks(blocks_of(page), folder)
