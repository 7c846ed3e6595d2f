"""Several runs side by side: their final numbers, the settings that differ, and what one sees, in a sentence."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slsam_ds.report.facts import active_shares, mean, median
from slsam_ds.report.history import Floats, RunHistory
from slsam_ds.report.runs import Run
from slsam_ds.report.tables import Table

BASIS = (
    "Time is the median step's, on this machine and under its load. FLOPs are relative to a step of AdamW. Bytes are "
    "payload of the first rank's collectives, and what that rank held at once in the mean and in the largest step; "
    "they were counted while the steps ran, the first one left out. AdamW's gradients are the least that its engine "
    "holds: a bucket, or the rank's shard."
)
"""How the numbers of `numbers_table` are known."""

_MEGA = 1e6


@dataclass(frozen=True, slots=True)
class _Quantity:
    """A row: what it is, how it is found in a run (NaN: it is not known), and how it is written."""

    label: str
    read: Callable[[Run], float]
    write: Callable[[float], str]
    is_amount: bool = True  # of which two runs have a ratio that means something


def held_out_before(run: Run) -> float:
    """The first held-out loss; NaN where none was measured before the first step."""
    held_out, steps = run.history.held_out, run.history.steps
    return held_out[0][1] if held_out and held_out[0][0] < steps[0] else float("nan")


def held_out_after(run: Run) -> float:
    """The held-out loss after the last step; NaN where it was not measured there."""
    held_out, steps = run.history.held_out, run.history.steps
    return held_out[-1][1] if held_out and held_out[-1][0] >= steps[-1] else float("nan")


def seconds_per_step(run: Run) -> float:
    """The median."""
    return median(run.history.seconds)


def sent_per_step(run: Run) -> float:
    """Bytes, in the mean."""
    return mean(_settled(run.history.reduced_bytes + run.history.gathered_bytes))


def _settled(values: Floats) -> Floats:
    """Less the first step's, which sets things up, where there are others."""
    return values[1:] if len(values) > 1 else values


def _largest(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else float("nan")


def _mega(value: float) -> str:
    return f"{value / _MEGA:,.3g}" if value < 1e3 * _MEGA else f"{value / _MEGA:,.0f}"


def _held(name: str, summarise: Callable[[Floats], float]) -> Callable[[Run], float]:
    return lambda run: summarise(_settled(getattr(run.history, name)))


def _of_history(read: Callable[[RunHistory], float]) -> Callable[[Run], float]:
    return lambda run: read(run.history)


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _last_loss(history: RunHistory) -> float:
    return mean(history.loss_at_weights[-max(len(history) // 10, 1) :])


_QUANTITIES = (
    _Quantity("held-out loss before", held_out_before, _loss, is_amount=False),
    _Quantity("held-out loss after", held_out_after, _loss, is_amount=False),
    _Quantity("training loss, last tenth", _of_history(_last_loss), _loss, is_amount=False),
    _Quantity("steps", _of_history(lambda history: float(len(history))), lambda value: f"{value:,.0f}"),
    _Quantity("seconds per step", seconds_per_step, _number),
    _Quantity("FLOPs per step, AdamW = 1", _of_history(lambda history: mean(history.price)), _number),
    _Quantity("sent per step, MB", sent_per_step, _mega),
    _Quantity("gradients held, MB: mean step", _held("gradient_bytes", mean), _mega),
    _Quantity("gradients held, MB: largest step", _held("gradient_bytes", _largest), _mega),
    _Quantity("activations saved, MB: mean step", _held("activation_bytes", mean), _mega),
    _Quantity("activations saved, MB: largest step", _held("activation_bytes", _largest), _mega),
    _Quantity("layers updated per step", _of_history(lambda history: float(history.active.mean())), _percent),
    _Quantity("weights updated per step", _of_history(lambda history: mean(active_shares(history))), _percent),
    _Quantity("skipped steps", _of_history(lambda history: float(history.skipped.sum())), _number, is_amount=False),
)


def numbers_table(runs: Sequence[Run]) -> Table:
    """A row for each quantity that some run knows, a column for each run.

    Two runs are compared in one more column: losses by their difference, amounts by how many times as much it is.
    """
    compared = len(runs) == 2
    rows = []
    for quantity in _QUANTITIES:
        values = [quantity.read(run) for run in runs]
        if np.isnan(values).all() or (quantity.label == "skipped steps" and not any(values)):
            continue
        cells = ["" if np.isnan(value) else quantity.write(value) for value in values]
        if compared:
            cells.append(_times(*values) if quantity.is_amount else _difference(*values))
        rows.append((quantity.label, *cells))
    against = (f"{runs[1].name} vs {runs[0].name}",) if compared else ()
    return Table("Final numbers", ("", *(run.name for run in runs), *against), tuple(rows))


def _ratio(first: float, second: float) -> str:
    return f"{second / first:.2f}" if first and not np.isnan([first, second]).any() else ""


def _times(first: float, second: float) -> str:
    return f"{_ratio(first, second)}x" if _ratio(first, second) else ""


def _difference(first: float, second: float) -> str:
    return "" if np.isnan([first, second]).any() else f"{second - first:+.4f}"


def settings_table(runs: Sequence[Run]) -> Table:
    """A row for each setting in which the runs differ; empty cells where a run does not tell."""
    settings = [{**_named("slsam.", run, "slsam"), **_named("", run, "training")} for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [
        (name, *(_written(each[name]) if name in each else "" for each in settings))
        for name in names
        if len({json.dumps(each.get(name), sort_keys=True) for each in settings}) > 1
    ]
    return Table("Settings that differ", ("", *(run.name for run in runs)), tuple(rows))


def _named(prefix: str, run: Run, kind: str) -> dict[str, Any]:
    values = run.settings.get(kind)
    return {f"{prefix}{name}": value for name, value in values.items()} if isinstance(values, Mapping) else {}


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def sentences(runs: Sequence[Run]) -> list[str]:
    """The result, and whether the runs can be compared; none that has nothing to say."""
    return [sentence for sentence in (what_one_sees(runs), what_differs_at_the_start(runs)) if sentence]


def what_one_sees(runs: Sequence[Run]) -> str:
    """The result in one sentence, whichever run it is good for; empty where no held-out loss tells."""
    after = {run.name: held_out_after(run) for run in runs}
    known = sorted((loss, name) for name, loss in after.items() if not np.isnan(loss))
    if len(known) < 2 or len(known) < len(runs):
        return ""
    (lowest, best), (following, second) = known[:2]
    if f"{lowest:.4f}" == f"{following:.4f}":
        told = f"{best} and {second} end at the same held-out loss, {lowest:.4f}"
    else:
        told = f"{best} ends at the lowest held-out loss, {following - lowest:.4f} below {second}"
    if len(runs) == 2:
        times = _told_ratio(runs, seconds_per_step, "of the time")
        sent = _told_ratio(runs, sent_per_step, "of the bytes")
        ratios = " and ".join(ratio for ratio in (times, sent) if ratio)
        told += f"; a step of {runs[1].name} takes {ratios} of one of {runs[0].name}" if ratios else ""
    return f"{told}."


def _told_ratio(runs: Sequence[Run], read: Callable[[Run], float], what: str) -> str:
    first, second = (read(run) for run in runs)
    return f"{_ratio(first, second)} {what}" if _ratio(first, second) else ""


def what_differs_at_the_start(runs: Sequence[Run]) -> str:
    """A sentence where held-out losses before the first step tell that runs did not start alike; else empty."""
    before = sorted({f"{held_out_before(run):.4f}" for run in runs} - {"nan"})
    return f"The runs did not start alike: held-out losses before are {', '.join(before)}." if before[1:] else ""
