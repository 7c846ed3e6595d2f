"""`slsam settings`: every setting with its default and what it does, as `SLSAMConfig` documents it."""

import argparse
import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from slsam_ds.config import SLSAMConfig
from slsam_ds.sentences import did_you_mean, refuse

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting.

    Attributes:
        name: Its key in the `slsam` block.
        default: As JSON has it.
        text: What it does.
    """

    name: str
    default: str
    text: str


def all_knobs() -> list[Knob]:
    """In the order of the class. The texts are the docstrings below its fields, which Python does not keep."""
    (source,) = ast.parse(inspect.getsource(SLSAMConfig)).body
    assert isinstance(source, ast.ClassDef)
    texts = {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in zip(source.body, source.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    return [Knob(each.name, json.dumps(each.default), texts[each.name]) for each in dataclasses.fields(SLSAMConfig)]


def markdown_table() -> str:
    """The table of docs/settings.md."""
    rows = ((f"`{knob.name}`", f"`{knob.default}`", knob.text.replace("|", r"\|")) for knob in all_knobs())
    return "\n".join(f"| {' | '.join(row)} |" for row in (("setting", "default", "what it does"), ("---",) * 3, *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2, after one sentence on stderr, where there is no such setting.
    """
    parser = argparse.ArgumentParser(
        prog="slsam settings",
        description="Show SL-SAM's settings with their defaults. Without NAME, show all of them.",
        epilog="Give a setting by --slsam NAME=VALUE, in the slsam block of the DeepSpeed JSON, or in SLSAMConfig. "
        "docs/settings.md has more about each, and slsam recipes lists presets.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="Show this setting.")
    given = parser.parse_args(argv)
    knobs = {knob.name: knob for knob in all_knobs()}
    if given.name is not None and given.name not in knobs:
        hint = did_you_mean(given.name, knobs, f"choose one of {', '.join(knobs)}")
        return refuse(f"{given.name}: no such setting; {hint}")
    for knob in knobs.values() if given.name is None else [knobs[given.name]]:
        print(f"{knob.name}={knob.default}")
        print(textwrap.fill(knob.text, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    return 0
