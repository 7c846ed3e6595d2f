"""`slsam settings`, and the tables in the documentation that show what it and `slsam --help` print."""

import dataclasses
from pathlib import Path

import pytest

from slsam_ds.cli.dispatch import COMMANDS
from slsam_ds.cli.dispatch import main as slsam
from slsam_ds.cli.knobs import all_knobs, markdown_table
from slsam_ds.config import SLSAMConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_every_setting_has_a_text() -> None:
    assert [knob.name for knob in all_knobs()] == [field.name for field in dataclasses.fields(SLSAMConfig)]
    assert all(len(knob.text) > 20 for knob in all_knobs())


def test_one_or_all_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert slsam(["settings", "rho"]) == 0
    assert capsys.readouterr().out.startswith("rho=0.05\n    Perturbation radius in parameter units")
    assert slsam(["settings"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{knob.name}={knob.default}\n" in f"\n{printed}" for knob in all_knobs())


def test_an_unknown_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert slsam(["settings", "rhoo"]) == 2
    assert capsys.readouterr().err == "error: rhoo: no such setting; did you mean rho?\n"


def test_the_documentation_has_all_settings_and_commands() -> None:
    """Where one was changed, put in what `slsam_ds.cli.knobs.markdown_table()` returns."""
    assert markdown_table() in (DOCS / "settings.md").read_text(encoding="utf-8")
    commands = (DOCS / "reference" / "command_line.md").read_text(encoding="utf-8")
    assert all(f"| `slsam {name}` | {command.text} |" in commands for name, command in COMMANDS.items())
