"""The command: reads the records, prints the tables, writes the pictures and the page."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE
from slsam_ds.report.comparison import numbers_table, sentences, settings_table
from slsam_ds.report.facts import facts_as_text
from slsam_ds.report.history import RecordsError, RunHistory
from slsam_ds.report.runs import Run, read_runs
from slsam_ds.report.tables import layer_table, progress_table
from slsam_ds.report.writing import (
    COMPARISON_PAGE_FILE,
    COMPARISON_PICTURE_FILE,
    PAGE_FILE,
    PICTURE_FILE,
    write_comparison,
    write_report,
)
from slsam_ds.sentences import refuse

_SECONDS = 10.0

_DESCRIPTION = f"""
Show what a run with SL-SAM did. The command reads {LAYERS_FILE} and {STEPS_FILE} in OUTPUT_DIR
(the --output_dir of launch/train.py or of any SLSAMTrainer), prints tables, and writes two files into
the same folder:

  {PAGE_FILE}  all tables and figures on one self-contained page
  {PICTURE_FILE}   the figures alone

They show which layers were selected and with what probability, their gradient norms, the loss and how
much the perturbation raised it, how much of the perturbation reached the weights, the fraction of
weights trained, the estimated cost relative to AdamW and dense SAM, skipped steps, and seconds.

Given several folders, the command compares the runs: curves in one figure, final numbers, and the
settings that differ. It writes {COMPARISON_PAGE_FILE} and {COMPARISON_PICTURE_FILE} into the
folder that contains all of them.

The run may still be in progress; the report then shows the steps recorded so far. With --follow the
page is rewritten until the run ends, and a browser that shows the page reloads it.
"""

_EPILOG = """
examples:
  slsam report outputs/run
  slsam report outputs/run --to public/run
  slsam report outputs/demo/adamw outputs/demo/defaults
  slsam report outputs/run --follow

Needs matplotlib: pip install "slsam-ds[report]".
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where the input cannot be used, after one sentence on stderr.
    """
    parsed = _make_parser().parse_args(arguments)
    folders: list[Path] = parsed.output_dirs
    target = parsed.to or _common_folder(folders)
    try:
        if parsed.follow is not None:
            return _follow(folders, target, parsed.follow)
        runs = read_runs(folders)
        print(describe(runs[0].history) if len(runs) == 1 else describe_comparison(runs))
        written = _write(runs, target)
    except RecordsError as error:
        return refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        return refuse('the figures need matplotlib: pip install "slsam-ds[report]", or pip install matplotlib')
    except OSError as error:
        return refuse(f"{error.filename or target}: {error.strerror or error}")
    page, picture = written
    print(f"\nPictures: {picture}\nPage: {page}")
    return 0


def describe(history: RunHistory) -> str:
    """The run as text."""
    facts = "\n".join(facts_as_text(history))
    return f"{layer_table(history)}\n\n{progress_table(history)}\n\n{facts}"


def describe_comparison(runs: Sequence[Run]) -> str:
    """Several runs as text."""
    tables = [str(table) for table in (settings_table(runs), numbers_table(runs)) if table.rows]
    return "\n\n".join([*tables, *sentences(runs)])


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slsam report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "output_dirs",
        metavar="OUTPUT_DIR",
        nargs="+",
        type=Path,
        help="output folder of a run; several folders are compared",
    )
    parser.add_argument("--to", metavar="DIR", type=Path, help="write to this folder instead; created if missing")
    parser.add_argument(
        "--follow",
        metavar="SECONDS",
        nargs="?",
        type=_interval,
        const=_SECONDS,
        help=f"rewrite the page every SECONDS (default: {_SECONDS:g}) until the run ends or you press Ctrl-C",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))  # arguments may hold line breaks


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: choose a number of seconds, at least 1")
    return seconds


def _common_folder(folders: Sequence[Path]) -> Path:
    """Where the page goes that nobody has named a folder for."""
    if len(folders) == 1:
        return folders[0]
    return Path(os.path.commonpath([folder.resolve().parent for folder in folders]))


def _write(runs: Sequence[Run], target: Path, refresh: float | None = None) -> tuple[Path, Path]:
    """Write page and picture, and return their paths."""
    if len(runs) > 1:
        write_comparison(runs, target, refresh=refresh)
        return target / COMPARISON_PAGE_FILE, target / COMPARISON_PICTURE_FILE
    write_report(runs[0].history, runs[0].name, target, refresh=refresh)
    return target / PAGE_FILE, target / PICTURE_FILE


def _follow(folders: Sequence[Path], target: Path, seconds: float) -> int:
    """Write the page until every run has ended.

    Raises:
        RecordsError: There is no such folder, or what is in it is not a run's.
    """
    page: Path | None = None
    try:
        while True:
            try:
                runs = read_runs(folders)
            except RecordsError:
                # A run that reads its model has recorded nothing yet.
                if page is not None or not all(folder.is_dir() for folder in folders):
                    raise
                print("Waiting for the first step ...", flush=True)
                while not all((folder / STEPS_FILE).is_file() and _has_step(folder) for folder in folders):
                    time.sleep(min(seconds, 1.0))
                continue
            ended = all(run.has_ended for run in runs)
            written, _ = _write(runs, target, refresh=None if ended else seconds)
            if page is None:
                print(f"Page: {written}\nIt is rewritten every {seconds:g} s until the run ends; Ctrl-C stops.")
            page = written
            if ended:
                print("The run has ended.")
                return 0
            sys.stdout.flush()
            time.sleep(seconds)
    except KeyboardInterrupt:
        if page is not None:
            _write(read_runs(folders), target)  # once more, as a page that a browser does not load again
        print("\nStopped following; the run continues.")
        return 0


def _has_step(folder: Path) -> bool:
    """Whether the first line is there, which is written at once."""
    with (folder / STEPS_FILE).open("rb") as lines:
        return lines.readline().endswith(b"\n")
