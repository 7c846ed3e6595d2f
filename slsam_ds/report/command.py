"""The command: reads the records, prints the tables, writes the pictures and the page."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE
from slsam_ds.report.facts import PRICE_ASSUMPTIONS, facts_as_text, run_facts
from slsam_ds.report.history import RecordsError, RunHistory, read_history
from slsam_ds.report.page import Picture, build_page
from slsam_ds.report.tables import layer_table, progress_table

PICTURE_FILE = "slsam_report.png"
PAGE_FILE = "slsam_report.html"

_EXIT_CODE = 2  # what argparse returns on a usage error

_DESCRIPTION = f"""
Show what a run with SL-SAM did. Reads {LAYERS_FILE} and {STEPS_FILE} in OUTPUT_DIR (the
--output_dir of launch/train.py or of any SLSAMTrainer), prints tables, and writes

  {PAGE_FILE}  everything on one page that needs no other file
  {PICTURE_FILE}   the pictures alone

into the same folder. Which layers were chosen and how likely that was, their gradient norms, the loss
and how far the perturbation raised it, how much of the perturbation reached the weights, the share of
weights trained, an estimate of the price against AdamW and dense SAM, skipped steps, and seconds.

A run may still be going on: what it has recorded so far is shown; run this again for more.
"""

_EPILOG = """
examples:
  slsam report outputs/demo
  slsam report outputs/demo --to public/demo

Needs matplotlib: pip install "slsam-ds[report]".
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where the input cannot be used, after one sentence on stderr.
    """
    parser = _Parser(
        prog="slsam report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="folder that the run writes into")
    parser.add_argument("--to", metavar="DIR", type=Path, help="write here instead; made where missing")
    parsed = parser.parse_args(arguments)
    target = parsed.to or parsed.output_dir
    try:
        history = read_history(parsed.output_dir)
        print(describe(history))
        write_report(history, parsed.output_dir.resolve().name, target)
    except RecordsError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return _refuse('the pictures need matplotlib: pip install "slsam-ds[report]", or pip install matplotlib')
    except OSError as error:
        return _refuse(f"{error.filename or target}: {error.strerror or error}")
    print(f"\nPictures: {target / PICTURE_FILE}\nPage: {target / PAGE_FILE}")
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))  # arguments may hold line breaks


def describe(history: RunHistory) -> str:
    """The run as text."""
    facts = "\n".join(facts_as_text(history))
    return f"{layer_table(history)}\n\n{progress_table(history)}\n\n{facts}"


def write_report(history: RunHistory, name: str, target: Path) -> None:
    """Write picture and page into a folder, which is made where missing.

    Args:
        history: The run.
        name: What to call it.
        target: The folder.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The files cannot be written.
    """
    from slsam_ds.report.figures import DARK, LIGHT, draw_panel, draw_report, panels_of

    target.mkdir(parents=True, exist_ok=True)
    title = f"SL-SAM: {name}"
    first, last, num_layers = history.steps[0], history.steps[-1], len(history.names)
    subtitle = f"Steps {first:,} to {last:,}" if last > first else f"Step {first:,}"
    subtitle = f"{subtitle}, {num_layers} layers, {history.numels.sum():,} weights"
    pictures = [
        Picture(
            panel.title,
            panel.caption,
            *(draw_panel(panel, history, theme) for theme in (LIGHT, DARK)),
            *(draw_panel(panel, history, theme, wide=True) for theme in (LIGHT, DARK) if panel.wide),
        )
        for panel in panels_of(history)
    ]
    tables = (progress_table(history), layer_table(history))
    page = build_page(title, subtitle, run_facts(history), pictures, tables, [PRICE_ASSUMPTIONS])
    _write(target / PICTURE_FILE, draw_report(history, title, subtitle))
    _write(target / PAGE_FILE, page.encode("utf-8"))


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a page that is open in a browser may be loaded again at any moment."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _refuse(sentence: str) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return _EXIT_CODE
