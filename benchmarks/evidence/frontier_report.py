"""The report of the frontier: per task, what every candidate learned and what it cost."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence import tuning
from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.long_tasks import LONG_TASKS
from benchmarks.evidence.paired import difference, reaches
from benchmarks.evidence.step_costs import FILE as COSTS
from benchmarks.evidence.step_costs import StepCost, read_costs
from benchmarks.evidence.trials import FILE, TUNING_SEED, Checkpoint, Outcome, Setting, Trials

REPORT, PICTURE = "frontier.md", "frontier.png"
SUMMARISED = 8
"""Seeds that a recipe has on a task where it is a row of the summary."""
REFERENCE, DENSE = "adamw", "dense_sam"

_INTRODUCTION = f"""# Frontier: test loss against price

Written by `python -m benchmarks.evidence.frontier`; do not edit. Every run is a line of [`{FILE}`]({FILE}); the rules
are in [`RULES.md`](RULES.md). A row is made again by

<!-- test: skip takes hours -->
```bash
python -m benchmarks.evidence.frontier --tasks TASK --candidates adamw dense_sam NAME --output outputs/mine
```

FLOPs are of whole runs, AdamW over all of the task's steps being 1. So is time, under ZeRO-2 on two ranks: steps of
each recipe were measured on a Llama of equal blocks, stock AdamW in turn with them; memory is of such a step, AdamW's
being 1 (`{COSTS}`, by `python -m benchmarks.evidence.step_costs`). Losses are cross-entropies in nats on
test data, of the last weights and of the checkpoint that validation data chose: the last, the best on the way, or the
mean of the last quarter's weights. Differences are of the chosen ones, seed by seed, ± the standard error. `*`: the
best setting has a neighbour that was not tried. *tuned* is the number of trials that chose it; with 0, it is dense
SAM's, the radius in proportion.
"""

_SUMMARY = f"""AdamW's test loss; and of each recipe with {SUMMARISED} seeds or more, its test loss minus AdamW's, ± the
standard error. Below 0 is better."""


def tuned_losses(trials: Trials, task: str, candidate: str) -> dict[Setting, float]:
    """Validation losses of a candidate's tuning with the first seed, by setting."""
    found = [one for one in trials.of(task, candidate) if one.trial.seed == TUNING_SEED]
    return {one.trial.setting: one.loss(one.chosen(), "validation") for one in found}


def best_of_first(trials: Trials, task: str, candidate: str, number: int) -> list[Setting]:
    """So many settings with the least validation losses, by the first seed alone."""
    tried = tuned_losses(trials, task, candidate)
    return sorted(tried, key=tried.__getitem__)[:number]


def best(trials: Trials, task: str, candidate: str) -> Setting:
    """The setting with the least validation loss, on average over the seeds of those that were tried with all.

    Where none was tried with more than the first seed, by that; where none was tried at all, dense SAM's, or where
    tuning starts.
    """
    by_setting: dict[Setting, list[float]] = defaultdict(list)
    for one in trials.of(task, candidate):
        if one.is_tuning:
            by_setting[one.trial.setting].append(one.loss(one.chosen(), "validation"))
    most = max(map(len, by_setting.values()), default=0)
    tried = {setting: statistics.fmean(losses) for setting, losses in by_setting.items() if len(losses) == most}
    if tried:
        return min(tried, key=tried.__getitem__)
    first, of_dense = tuning.start(CANDIDATES[candidate]), tuned_losses(trials, task, DENSE)
    if not of_dense:
        return first
    dense = min(of_dense, key=of_dense.__getitem__)
    rho = tuning.tidy(first.rho * dense.rho / tuning.start(CANDIDATES[DENSE]).rho)
    return replace(first, learning_rate=dense.learning_rate, rho=rho)


def finals(trials: Trials, task: str, candidate: str, setting: Setting | None = None) -> list[Outcome]:
    """Reported runs of a setting; None: of the best one."""
    wanted = setting or best(trials, task, candidate)
    return [one for one in trials.of(task, candidate) if one.trial.setting == wanted and not one.is_tuning]


def losses_on_test(outcomes: Sequence[Outcome], checkpoint: Checkpoint | None = None) -> dict[int, float]:
    """By seed; of a checkpoint, or of the one that validation data chose."""
    return {one.trial.seed: one.loss(checkpoint or one.chosen(), "test") for one in outcomes}


def write_report(folder: Path, trials: Trials) -> Path:
    """Report and pictures.

    Returns:
        The report's path.
    """
    from benchmarks.evidence.frontier_figure import draw_frontier, draw_summary

    trials.read()  # what other processes have added
    costs = read_costs(folder)
    parts = [_INTRODUCTION, "## Which tasks decide\n\n" + _headroom_table(trials)]
    folder.mkdir(parents=True, exist_ok=True)
    summarised = [name for name in LONG_TASKS if _is_summarised(trials, name, DENSE)]
    if summarised:
        draw_summary(folder / PICTURE, trials, summarised)
        parts += ["## All tasks", _SUMMARY, _summary_table(trials, summarised), f"![{PICTURE}]({PICTURE})"]
    for name, task in LONG_TASKS.items():
        if any(finals(trials, name, candidate) for candidate in CANDIDATES):
            picture = f"frontier-{name}.png"
            draw_frontier(folder / picture, trials, name, costs)
            parts += [f"## {name}: {task.title}", _table(trials, name, costs), f"![{picture}]({picture})"]
    path = folder / REPORT
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def task_table(trials: Trials, task: str) -> str:
    """What every candidate learned on a task, in Markdown."""
    return _table(trials, task, {})


def _is_summarised(trials: Trials, task: str, candidate: str) -> bool:
    return len(finals(trials, task, candidate)) >= SUMMARISED


def _summary_table(trials: Trials, tasks: Sequence[str]) -> str:
    """How far each recipe's loss is below AdamW's on each task, where it has enough seeds."""
    lines = [f"| recipe | FLOPs | {' | '.join(f'`{task}`' for task in tasks)} |", "|---" * (len(tasks) + 2) + "|"]
    for name, candidate in CANDIDATES.items():
        outcomes = {task: finals(trials, task, name) for task in tasks if _is_summarised(trials, task, name)}
        if not outcomes:
            continue
        cells = []
        for task in tasks:
            losses, adamw = (losses_on_test(some) for some in (outcomes.get(task, []), finals(trials, task, REFERENCE)))
            cells.append(_mean(losses) if name == REFERENCE else str(difference(losses, adamw) or ""))
        flops = statistics.fmean(one.flops for some in outcomes.values() for one in some)
        lines.append(f"| `{name}`: {candidate.title} | {flops:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _headroom_table(trials: Trials) -> str:
    """Whether dense SAM is below AdamW by more than two standard errors."""
    lines = ["| task | seeds | AdamW | dense SAM | dense SAM minus AdamW | decides |", "|---|---|---|---|---|---|"]
    for name, task in LONG_TASKS.items():
        adamw, dense = (losses_on_test(finals(trials, name, one)) for one in (REFERENCE, DENSE))
        gap = difference(dense, adamw)
        if gap is not None:
            means = [f"{statistics.fmean(losses.values()):.4f}" for losses in (adamw, dense)]
            decides = "yes" if gap.is_lower else "no"
            lines.append(f"| `{name}`: {task.title} | {gap.num} | {' | '.join(means)} | {gap} | {decides} |")
    return "\n".join(lines)


def _table(trials: Trials, task: str, costs: Mapping[str, StepCost]) -> str:
    header = [
        "recipe",
        "setting",
        "tuned",
        "FLOPs",
        "time",
        "memory",
        "seeds",
        "last",
        "chosen",
        "minus AdamW's",
        "minus dense SAM's",
        "reaches it",
    ]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(trials, task, costs)]
    return "\n".join(lines)


def _rows(trials: Trials, task: str, costs: Mapping[str, StepCost]) -> Iterator[list[str]]:
    adamw, dense = (losses_on_test(finals(trials, task, one)) for one in (REFERENCE, DENSE))
    for name, candidate in CANDIDATES.items():
        outcomes = finals(trials, task, name)
        if not outcomes:
            continue
        ours, setting, tried = losses_on_test(outcomes), outcomes[0].trial.setting, tuned_losses(trials, task, name)
        cost = costs.get(name)
        verdict = reaches(ours, dense, adamw) if name not in (REFERENCE, DENSE) else None
        yield [
            f"`{name}`: {candidate.title}",
            _shown(setting) + ("" if tuning.is_enclosed(setting, tried, candidate) else "*"),
            str(len(tried)),
            f"{statistics.fmean(one.flops for one in outcomes):.2f}",
            f"{cost.time * setting.share:.2f}" if cost else "",
            f"{cost.memory:.2f}" if cost else "",
            str(len(outcomes)),
            _mean(losses_on_test(outcomes, "last")),
            _mean(ours),
            str(difference(ours, adamw) or "") if name != REFERENCE else "",
            str(difference(ours, dense) or "") if name != DENSE else "",
            {True: "yes", False: "no", None: ""}[verdict],
        ]


def _shown(setting: Setting) -> str:
    parts = [f"{setting.learning_rate:g}"]
    usual = Setting(learning_rate=0.0, rho=0.0)
    for name in ("rho", "weight_decay", "dropout", "share"):
        value = getattr(setting, name)
        if value != getattr(usual, name):
            parts.append(f"{name.replace('_', ' ')} {value:g}")
    return ", ".join(parts)


def _mean(losses: Mapping[int, float]) -> str:
    return f"{statistics.fmean(losses.values()):.4f}"
