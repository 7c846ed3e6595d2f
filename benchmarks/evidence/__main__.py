"""The command: makes the runs that are missing, a line of JSON each, and the tables and pictures of all there are."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.report import write_report
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.study import KNOBS, OFFERED, QUICK, Study
from benchmarks.evidence.tasks import TASKS
from benchmarks.evidence.training import run
from benchmarks.results import describe_machine

_EXIT_CODE = 2  # what argparse returns on a usage error

_DESCRIPTION = """
Measure what is learned: methods x tasks x seeds. Every method's learning rate is tuned on validation data with as many
runs (stage tune); then every seed is judged by test data (stage final); then single knobs of SL-SAM are turned (stage
knobs, validation data). Each run is one line of runs.jsonl in --output; runs that are there are not made again, so a
stopped command goes on. Tables and pictures are of all runs there are.
"""

_EPILOG = """
examples:
  python -m benchmarks.evidence                                   # whatever is missing of docs/evidence: many hours
  python -m benchmarks.evidence --quick                           # a first look: under ten minutes on two cores
  python -m benchmarks.evidence --tasks digits --methods slsam dense_sam --stages tune final --output outputs/mine
  python -m benchmarks.evidence --tasks digits --methods slsam --stages tune knobs --knobs rho --output outputs/mine
  python -m benchmarks.evidence --tables-only
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where something needed is missing or damaged, after one sentence on stderr.
    """
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    transformers.utils.logging.set_verbosity_error()  # a new head is no news
    transformers.utils.logging.disable_progress_bar()
    folder = options.output or Path("outputs/evidence-quick" if options.quick else "docs/evidence")
    try:
        runs = Runs(folder)
        if not options.tables_only:
            _make(_study(options), runs)
        print(f"Report: {write_report(folder, runs)}")
    except (LookupError, ModuleNotFoundError, ValueError) as error:
        print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
        return _EXIT_CODE
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _study(options: argparse.Namespace) -> Study:
    given = {
        "tasks": options.tasks,
        "methods": options.methods,
        "stages": options.stages,
        "num_seeds": options.seeds,
        "base": options.base,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(QUICK if options.quick else Study(), knobs=options.knobs, **changed)


def _make(study: Study, runs: Runs) -> None:
    machine = describe_machine()
    for key in study.keys(runs):
        if key in runs:
            continue
        started = time.monotonic()
        try:
            found = run(
                TASKS[key.task],
                METHODS[key.method],
                learning_rate=key.learning_rate,
                seed=key.seed,
                steps=study.steps(key, runs),
                knobs=key.knobs,
                on_test=key.stage == "final",
            )
        except ValueError as error:
            if not key.knobs:
                raise
            # A method may exclude a knob's value: without an ascent no step costs a budget of 1.
            print(f"{key}: left out, {error}", flush=True)
            continue
        made = runs.add(key, {**found, "machine": machine})
        data = "test" if key.stage == "final" else "validation"
        seconds = time.monotonic() - started
        print(f"{key}: {data} loss {made.loss:.4f}, price {found['price']:.2f} ({seconds:.0f} s)", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--stages", nargs="+", choices=("tune", "final", "knobs"), help="default: all, in this order")
    parser.add_argument(
        "--knobs", nargs="+", choices=KNOBS, metavar="KNOB", default=list(KNOBS), help=f"of {', '.join(KNOBS)}"
    )
    parser.add_argument("--base", choices=OFFERED, help=f"whose knobs are turned (default: {OFFERED[0]})")
    parser.add_argument("--seeds", type=_at_least_two, metavar="N", help="of the final runs (default: 5)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: docs/evidence")
    parser.add_argument("--quick", action="store_true", help="one task, four methods, short runs, two seeds")
    parser.add_argument("--tables-only", action="store_true", help="make no runs, write the report again")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (default: the cores)")
    return parser


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("choose at least 2 seeds, for there to be a standard error")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
