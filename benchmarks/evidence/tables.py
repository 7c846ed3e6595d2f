"""Means, standard errors and paired differences of the runs there are, as Markdown."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.evidence.methods import METHODS
from benchmarks.evidence.runs import Key, Run, Runs
from benchmarks.evidence.study import KNOBS, OFFERED, Change, best_rate
from benchmarks.evidence.tasks import TASKS

REFERENCE, DENSE = "adamw", "dense_sam"


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; the error of one value alone is not known."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of independent values."""
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), spread / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.3f}{self._shown_error}"

    @property
    def signed(self) -> str:
        """For a difference."""
        return f"{self.mean:+.3f}{self._shown_error}"

    @property
    def _shown_error(self) -> str:
        return "" if math.isnan(self.error) else f" ± {self.error:.3f}"


def difference(ours: Sequence[Run], theirs: Sequence[Run]) -> Mean | None:
    """Of the losses, seed by seed; None where they have no seed in common."""
    losses = {run.key.seed: run.loss for run in theirs}
    paired = [run.loss - losses[run.key.seed] for run in ours if run.key.seed in losses]
    return Mean.of(paired) if paired else None


def time_ratio(ours: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Of the wall clocks of whole runs, seed by seed: their median. Runs of a seed were made one after the other."""
    seconds = {run.key.seed: run.found["seconds"] for run in theirs}
    ratios = [run.found["seconds"] / seconds[run.key.seed] for run in ours if run.key.seed in seconds]
    return statistics.median(ratios) if ratios else None


def tuning_table(runs: Runs, task: str) -> str:
    """The validation loss of every learning rate that was tried, and what such a run costs."""
    rates = TASKS[task].learning_rates
    lines = [
        f"| method | {' | '.join(f'{rate:g}' for rate in rates)} | FLOPs / AdamW |",
        "|---|" + "---|" * (len(rates) + 1),
    ]
    for name, method in METHODS.items():
        tried = {run.key.learning_rate: run for run in runs.of("tune", task, name)}
        if tried:
            best = tried[best_rate(runs, task, method)]
            losses = [f"{tried[rate].loss:.3f}" if rate in tried else "" for rate in rates]
            lines.append(f"| {method.title} | {' | '.join(losses)} | {best.found['price']:.2f} |")
    return "\n".join(lines)


def methods_table(runs: Runs, task: str) -> str:
    """The methods on a task's test data."""
    adamw, dense = runs.of("final", task, REFERENCE), runs.of("final", task, DENSE)
    lines = [
        "| method | learning rate | steps | FLOPs / AdamW | time / AdamW | test loss | minus AdamW's | "
        "minus dense SAM's | accuracy | calibration error | rise along gradient | rise in random directions |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, some in _finals(runs, task):
        scores = {
            name: Mean.of([run.found["test"][name] for run in some]) for name in ("accuracy", "calibration_error")
        }
        rises = {
            name: Mean.of([run.found["sharpness"][name] for run in some])
            for name in ("along_gradient", "in_random_directions")
        }
        steps, price = some[0].found["steps"], _mean_price(some)
        cells = [
            METHODS[method].title,
            f"{some[0].key.learning_rate:g}{'*' if _at_edge(some[0].key) else ''}",
            f"{steps}",
            f"{price * steps / (adamw or some)[0].found['steps']:.2f}",
            _shown(time_ratio(some, adamw)),
            str(Mean.of([run.loss for run in some])),
            _signed(difference(some, adamw)) if method != REFERENCE else "",
            _signed(difference(some, dense)) if method != DENSE else "",
            str(scores["accuracy"]),
            str(scores["calibration_error"]),
            str(rises["along_gradient"]),
            f"{rises['in_random_directions'].mean:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(runs: Runs) -> str:
    """For every task, defaults and presets: are they as good as dense SAM, and at what price?"""
    lines = [
        "| task | setting | test loss | dense SAM | AdamW | within one standard error of dense SAM, or better | "
        "FLOPs / AdamW | time / AdamW |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        dense, adamw = (runs.of("final", task, name) for name in (DENSE, REFERENCE))
        for name in OFFERED:
            ours = runs.of("final", task, name)
            if not (ours and dense and adamw):
                continue
            losses = [Mean.of([run.loss for run in some]) for some in (ours, dense, adamw)]
            as_good = losses[0].mean <= losses[1].mean + losses[1].error
            cells = [
                TASKS[task].title,
                METHODS[name].title.removeprefix("SL-SAM, "),
                *map(str, losses),
                "yes" if as_good else "**no**",
                f"{_mean_price(ours):.2f}",
                _shown(time_ratio(ours, adamw)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layers_table(runs: Runs, task: str) -> str:
    """Where the updates went: shares of all draws."""
    lines = ["| method | before the blocks | lower half | upper half | after the blocks |", "|---|---|---|---|---|"]
    for method, some in _finals(runs, task):
        if METHODS[method].knobs.get("selector") in ("all", "uniform"):
            continue
        drawn = [sum(counts) for counts in zip(*(run.found["updates"] for run in some), strict=True)]
        middle, total = 1 + (len(drawn) - 2) // 2, sum(drawn)
        parts = (drawn[:1], drawn[1:middle], drawn[middle:-1], drawn[-1:])
        lines.append(f"| {METHODS[method].title} | {' | '.join(f'{sum(part) / total:.0%}' for part in parts)} |")
    return "\n".join(lines)


def knobs_table(runs: Runs, task: str, base: str) -> str:
    """What turning one knob of a method does to the validation loss."""
    standard = _changed(runs, task, base, Change())
    lines = ["| knob | setting | validation loss | less the first row's | FLOPs / AdamW |", "|---|---|---|---|---|"]
    lines.append(f"| | as it is | {Mean.of([run.loss for run in standard])} | | {_mean_price(standard):.2f} |")
    for name, changes in KNOBS.items():
        for change in changes:
            some = _changed(runs, task, base, change)
            if some:
                loss = Mean.of([run.loss for run in some])
                setting = ", ".join([*map(str, change.knobs.values()), *_rate(change)])
                difference_ = _signed(difference(some, standard))
                lines.append(f"| {name} | {setting} | {loss} | {difference_} | {_mean_price(some):.2f} |")
    return "\n".join(lines)


def has_knobs(runs: Runs, task: str, base: str) -> bool:
    """Whether the method as it is was run on the validation data of the stage knobs."""
    return bool(runs.of("knobs", task, base, where=lambda key: not key.knobs))


def _changed(runs: Runs, task: str, base: str, change: Change) -> list[Run]:
    rate = best_rate(runs, task, METHODS[base]) * change.rate

    def is_it(key: Key) -> bool:
        return dict(key.knobs) == change.knobs and math.isclose(key.learning_rate, rate)

    return runs.of("knobs", task, base, where=is_it)


def _rate(change: Change) -> Iterator[str]:
    if change.rate != 1:
        yield f"learning rate x {change.rate:g}"


def _finals(runs: Runs, task: str) -> Iterator[tuple[str, list[Run]]]:
    for method in METHODS:
        some = runs.of("final", task, method)
        if some:
            yield method, some


def _at_edge(key: Key) -> bool:
    rates = TASKS[key.task].learning_rates
    return key.learning_rate in (rates[0], rates[-1])


def _mean_price(some: Sequence[Run]) -> float:
    return statistics.fmean(run.found["price"] for run in some) if some else math.nan


def _shown(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else ""


def _signed(value: Mean | None) -> str:
    return value.signed if value is not None else ""
