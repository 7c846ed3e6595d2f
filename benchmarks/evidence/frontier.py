"""The command: tunes every candidate with as many trials, runs the best settings over seeds, and writes the report."""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.evidence import tuning
from benchmarks.evidence.candidates import CANDIDATES, Candidate
from benchmarks.evidence.frontier_report import best, best_of_first, task_table, tuned_losses, write_report
from benchmarks.evidence.long_run import run_trial
from benchmarks.evidence.study_arguments import study_parser
from benchmarks.evidence.trials import MORE_TUNING_SEEDS, TUNING_SEED, Outcome, Setting, Trial, Trials
from benchmarks.results import describe_machine

_SHARES = (0.125, 0.25, 0.5, 1.0)
"""Of a task's steps: AdamW's own frontier."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        trials = Trials(options.output)
        if not options.tables_only:
            for task in options.tasks:
                if options.tuned_in is not None:
                    _adopt(task, options.candidates, Trials(options.tuned_in), trials)
                _study(task, [CANDIDATES[name] for name in options.candidates], trials, options)
        print(f"Report: {write_report(options.output, trials)}")
        print(*(task_table(trials, task) for task in options.tasks), sep="\n\n")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _study(task: str, candidates: Sequence[Candidate], trials: Trials, options: argparse.Namespace) -> None:
    for candidate in candidates:
        while len(tried := tuned_losses(trials, task, candidate.name)) < options.trials:
            setting = tuning.next_setting(tried, candidate) if tried else tuning.start(candidate)
            _made(Trial(task=task, candidate=candidate.name, setting=setting, seed=TUNING_SEED), trials)
        for setting in best_of_first(trials, task, candidate.name, options.again) if options.trials else ():
            for seed in MORE_TUNING_SEEDS:
                _made(Trial(task=task, candidate=candidate.name, setting=setting, seed=seed), trials)
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + options.seeds):
        for candidate in candidates:
            for setting in _final_settings(trials, task, candidate):
                _made(Trial(task=task, candidate=candidate.name, setting=setting, seed=seed), trials)


def _adopt(task: str, candidates: Sequence[str], others: Trials, trials: Trials) -> None:
    """Take the tuning over from another folder."""
    for candidate in candidates:
        for outcome in others.of(task, candidate):
            if outcome.is_tuning and trials.get(outcome.trial) is None:
                trials.add(outcome.trial, outcome.found)


def _final_settings(trials: Trials, task: str, candidate: Candidate) -> Iterator[Setting]:
    """The best; and of AdamW the same with all numbers of steps."""
    setting = best(trials, task, candidate.name)
    yield setting
    if "share" in candidate.axes:
        yield from (replace(setting, share=share) for share in _SHARES if share != setting.share)


def _made(trial: Trial, trials: Trials) -> Outcome:
    trials.read()  # another process may have made it
    outcome = trials.get(trial)
    if outcome is None:
        started = time.monotonic()
        outcome = trials.add(trial, {**run_trial(trial), "machine": describe_machine()})
        name = outcome.chosen()
        shown = f"validation {outcome.loss(name, 'validation'):.4f} ({name}), FLOPs {outcome.flops:.2f}"
        print(f"{trial}: {shown} ({time.monotonic() - started:.0f} s)", flush=True)
    return outcome


def _parser() -> argparse.ArgumentParser:
    parser = study_parser("frontier", __doc__, candidates=list(CANDIDATES))
    parser.add_argument(
        "--trials", type=int, default=12, metavar="N", help="of tuning, for each candidate; 0: as dense SAM was tuned"
    )
    parser.add_argument(
        "--again", type=int, default=3, metavar="N", help="of the best settings that are tried with more seeds"
    )
    parser.add_argument("--tuned-in", type=Path, metavar="DIR", help="begin with the tuning that was done there")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="of the final runs")
    return parser


if __name__ == "__main__":
    logging.getLogger("slsam_ds").setLevel(logging.ERROR)
    raise SystemExit(main())
