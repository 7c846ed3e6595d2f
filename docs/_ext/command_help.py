"""The directive `command-help`: each command of `slsam` with what its `--help` prints, asked for at build time."""

import contextlib
import io
import os
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from slsam_ds.cli.dispatch import COMMANDS
from slsam_ds.cli.dispatch import main as slsam

_COLUMNS = "100"


class CommandHelp(SphinxDirective):
    """A section for `slsam` itself, and one for each of its commands."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # flags may change where this page does not
        sections = [_section("slsam", "What all commands have in common.", _help_of([]))]
        for name, command in COMMANDS.items():
            text = f"{command.text[0].upper()}{command.text[1:]}."
            sections.append(_section(f"slsam {name}", text, _help_of([name])))
        return sections


def _help_of(arguments: list[str]) -> str:
    """What a command prints when it is asked for help."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS=_COLUMNS),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        slsam([*arguments, "--help"])
    return printed.getvalue().strip()


def _section(title: str, text: str, shown: str) -> nodes.section:
    identifier = nodes.make_id(title)
    block = nodes.literal_block(shown, shown, language="text")
    return nodes.section(
        "", nodes.title("", "", nodes.literal(title, title)), nodes.paragraph(text, text), block,
        ids=[identifier], names=[identifier],
    )  # fmt: skip


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
