"""The command: trains by each method in turn, then shows them side by side."""

import argparse
import shlex
import signal
import sys
import textwrap
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from slsam_ds.cli.compare.method import Method
from slsam_ds.cli.compare.training import LOG_FILE, TrainingFailedError, train
from slsam_ds.report.comparison import BASIS, numbers_table, sentences
from slsam_ds.report.history import RecordsError
from slsam_ds.report.runs import read_run
from slsam_ds.report.writing import COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE, write_comparison
from slsam_ds.sentences import refuse

EVIDENCE = (
    "This is one run of each, from one seed. What was measured with several seeds on several tasks is in "
    "docs/evidence/README.md."
)

_WIDTH = 100  # characters of a line of text
_STOPPED = 130  # what a shell returns after Ctrl-C

_DESCRIPTION = """
Train the same model on the same data with several methods, one after the other, and compare them.
All methods start from the same weights and see the same samples in the same order.

A METHOD is adamw (the optimizer alone: every layer in every step, no perturbation), defaults (SL-SAM
with its default settings, or those of the DeepSpeed JSON), a preset listed by `slsam recipes`, or
KEY=VALUE[,KEY=VALUE ...]. Flags after -- are flags of `slsam train` and apply to all methods.

The model must be a causal language model with a tokenizer. To compare methods in a script of your own,
run it once per method, `slsam run --slsam preset=NAME -- SCRIPT --output_dir DIR`, and then
`slsam report DIR DIR ...`.

Each training is started with `deepspeed --module slsam_ds.train` and writes into a subfolder of
--output_dir named after the method. At the end, a table is printed, and a figure and a page are written.
"""

_EPILOG = """
examples:
  slsam compare adamw defaults --num_accelerators 2 -- --deepspeed zero2
  slsam compare adamw adamw_price rho=0.02,active_layers=4 -- --deepspeed zero2 --train_file train.jsonl \\
      --validation_file valid.jsonl --max_steps 500
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where something cannot be used, the training's own where one fails, 130 after Ctrl-C.
    """
    given = _parse(sys.argv[1:] if argv is None else argv)
    try:
        methods = [Method.read(text, given.slsam) for text in given.methods]
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"{' '.join(given.methods)}: give each method once")
        for method in methods:
            (given.output_dir / method.name).mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        return refuse(str(error))
    except OSError as error:
        return refuse(f"--output_dir {given.output_dir}: cannot be written to ({error.strerror})")
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for method in methods:
            _train(method, given)
        return _show(methods, given.output_dir)
    except TrainingFailedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nStopped; no training is still running.", file=sys.stderr)
        return _STOPPED
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Our flags stand before `--`; those of them that stand behind it, as in `make demo ARGS=...`, count as well."""
    place = argv.index("--") if "--" in argv else len(argv)
    ours = _Parser(
        prog="slsam compare",
        usage="slsam compare METHOD METHOD [METHOD ...] [flags] -- [flags of slsam train]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    ours.add_argument("methods", nargs="+", metavar="METHOD", help="a method to train with; give at least two")
    ours.add_argument("--num_accelerators", type=_count, metavar="N", help="ranks (default: one per accelerator)")
    _add_common(ours, Path("outputs/compare"))
    given = ours.parse_args(argv[:place])
    if len(given.methods) < 2:
        ours.error("give at least two methods, such as: slsam compare adamw defaults")
    theirs = _Parser(prog="slsam compare", add_help=False, allow_abbrev=False)
    _add_common(theirs, given.output_dir)
    theirs.add_argument("--slsam", nargs="+", action="extend", default=[])
    behind, given.flags = theirs.parse_known_args(argv[place + 1 :])
    given.slsam, given.output_dir, given.verbose = behind.slsam, behind.output_dir, given.verbose or behind.verbose
    return given


def _add_common(parser: argparse.ArgumentParser, output_dir: Path) -> None:
    parser.add_argument(
        "--output_dir", type=Path, default=output_dir, metavar="DIR", help=f"for all output (default: {output_dir})"
    )
    parser.add_argument("--verbose", action="store_true", help="show everything that the trainings print")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "; put flags of slsam train after --" if message.startswith("unrecognized") else ""
        raise SystemExit(refuse(message + hint))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: choose a number of at least 1")
    return int(text)


def _train(method: Method, given: Any) -> None:
    folder = given.output_dir / method.name
    knobs = f" with --slsam {shlex.join(method.assignments)}" if method.assignments else ""
    log = "" if given.verbose else f"; its log is {folder / LOG_FILE}"
    print(f"Training {method.name}{knobs}{log}", flush=True)
    seconds = train(method, folder, given.flags, num_accelerators=given.num_accelerators, verbose=given.verbose)
    print(f"  done in {timedelta(seconds=round(seconds))}, loading and evaluation included", flush=True)


def _show(methods: Sequence[Method], output_dir: Path) -> int:
    try:
        runs = [read_run(output_dir / method.name, method.name) for method in methods]
    except RecordsError as error:
        return refuse(str(error))
    paragraphs = (" ".join([*sentences(runs), EVIDENCE]), BASIS)
    print(f"\n{numbers_table(runs)}\n")
    print("\n\n".join(textwrap.fill(text, _WIDTH, break_on_hyphens=False) for text in paragraphs), end="\n\n")
    try:
        write_comparison(runs, output_dir)
    except ModuleNotFoundError:
        print('No figure was written because matplotlib is missing: pip install "slsam-ds[report]"', file=sys.stderr)
        return 0
    print(f"Picture: {output_dir / COMPARISON_PICTURE_FILE}\nPage: {output_dir / COMPARISON_PAGE_FILE}")
    return 0


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
