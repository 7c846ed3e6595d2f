"""The command: what of dense SAM's correction each recipe captures, before anything is trained with it.

At three points of an AdamW run, over held-back data in windows of a training step's size.
"""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.candidates import CANDIDATES, Candidate
from benchmarks.evidence.corrections import Handed, MeanCorrection, Point, Vector, captured, handed
from benchmarks.evidence.long_run import MAX_GRAD_NORM, build, count, divided, loss_of, price, wrap
from benchmarks.evidence.long_tasks import LONG_TASKS
from benchmarks.evidence.screen_tables import FILE, write_tables
from benchmarks.evidence.study_arguments import study_parser
from benchmarks.evidence.tasks import Batch, Data, Task
from benchmarks.evidence.training import rate_at, training_batches
from benchmarks.evidence.trials import Setting
from benchmarks.evidence.tuning import tidy
from benchmarks.results import rounded
from slsam_ds import SLSAM
from slsam_ds.model.layers import LayerMap

_POINTS = {"early": 0.1, "middle": 0.5, "late": 0.9}
"""Shares of the run."""
_RHO = 0.05
_OTHER_RHOS = (0.02, 0.2)
"""At the middle alone."""
_NUM_WINDOWS, _BURN_IN = 25, 7
"""The first ones fill what a recipe remembers of earlier steps, and do not count. Their number is odd: a recipe that
perturbs every second or fourth step comes to all of them."""
_CANDIDATES = [name for name, candidate in CANDIDATES.items() if candidate.share == 1]
_ROUNDS = 2
"""Over the windows, of a recipe that does not do the same in every step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    for name in options.tasks if not options.tables_only else ():
        started = time.monotonic()
        candidates = [CANDIDATES[one] for one in options.candidates]
        screen(LONG_TASKS[name], candidates, options.learning_rate, Rows(options.output / FILE))
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"Report: {write_tables(options.output)}")
    return 0


class Rows:
    """The screen's file: a line of JSON for each task, point, radius and candidate, written when it is found.

    Args:
        path: Where the file is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._known = {self._id(json.loads(line)) for line in lines}

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._id(row) in self._known

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep it, on disk too."""
        self._known.add(self._id(row))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded(dict(row))) + "\n")

    def _id(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("task", "point", "rho", "candidate"))


def screen(task: Task, candidates: Sequence[Candidate], learning_rate: float, rows: Rows) -> None:
    """Find the rows of a task that are not there yet."""
    data = task.load()
    windows, points = _windows(task, data), _adamw_run(task, data, learning_rate)
    for name, rho in (*((name, _RHO) for name in points), *(("middle", rho) for rho in _OTHER_RHOS)):
        point = points[name]
        plain = _Recipe(task, data, CANDIDATES["adamw"], point, rho=0.0)
        gradients = [one.gradient for one in plain.over(windows, rounds=1)]
        delta = _Recipe(task, data, CANDIDATES["dense_sam"], point, rho=rho).correction(windows, gradients)[0]
        groups = groups_of(plain.layers)
        for candidate in candidates:
            row = {"task": task.name, "point": name, "rho": rho, "candidate": candidate.name}
            if row in rows or (rho != _RHO and candidate.knobs.get("rho") == 0):
                continue
            scaled = tidy(candidate.rho * rho / CANDIDATES["dense_sam"].rho)
            found, paid = _Recipe(task, data, candidate, point, rho=scaled).correction(windows, gradients)
            in_adams_units = captured(point.in_adams_units(found), point.in_adams_units(delta), list(delta))
            by_group = {group: captured(found, delta, members) for group, members in groups.items()}
            rows.add(
                {
                    **row,
                    "learning_rate": learning_rate,
                    "price": paid,
                    "all": dataclasses.asdict(captured(found, delta, list(delta))),
                    "in_adams_units": dataclasses.asdict(in_adams_units),
                    "groups": {group: dataclasses.asdict(one) for group, one in by_group.items()},
                    "shares": _shares(delta, groups),
                }
            )


class _Recipe:
    """A candidate at a point."""

    def __init__(self, task: Task, data: Data, candidate: Candidate, point: Point, *, rho: float) -> None:
        setting = Setting(learning_rate=1.0, rho=rho)
        model = build(data, setting, seed=0)
        self._candidate, self._loss_fn, self._after = candidate, loss_of(task), point.step
        self._slsam: SLSAM = wrap(model, candidate, setting, seed=0, steps=task.steps, max_grad_norm=None)
        point.put_into(model, self._slsam.engine.optimizer)

    @property
    def layers(self) -> LayerMap:
        return self._slsam.layers

    def over(self, windows: Sequence[Batch], *, rounds: int) -> Iterator[Handed]:
        """What the optimizer is handed, window by window."""
        slsam = self._slsam
        divided_windows = [divided(batch, self._candidate.num_micro_batches) for batch in windows]
        costs = count(slsam, divided_windows[0][0], self._loss_fn)
        yield from handed(
            slsam,
            divided_windows * rounds,
            self._loss_fn,
            after=self._after,
            price_of=lambda window, result: price(slsam, costs, window, result),
        )

    def correction(self, windows: Sequence[Batch], gradients: Sequence[Vector]) -> tuple[Vector, float]:
        """d, and the mean price of a step."""
        knobs = self._candidate.knobs
        rounds = _ROUNDS if knobs.get("selector") != "all" or "ascend_when" in knobs else 1
        mean, prices = MeanCorrection(), []
        for number, one in enumerate(self.over(windows, rounds=rounds)):
            prices.append(one.price)
            if number >= _BURN_IN:
                mean.add(one.gradient, gradients[number % len(windows)])
        return mean.mean(), sum(prices) / len(prices)


def groups_of(layers: LayerMap) -> dict[str, list[str]]:
    """Names of the parameters before the blocks, in their lower and upper half, and after them."""
    names = [[name for name, _ in layer.parameters] for layer in layers]
    middle = 1 + (len(names) - 2) // 2
    parts = {"before": names[:1], "lower": names[1:middle], "upper": names[middle:-1], "after": names[-1:]}
    return {part: [name for some in members for name in some] for part, members in parts.items()}


def _shares(delta: Vector, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Of the squared norm of dense SAM's correction."""
    sq_norms = {name: float(tensor.double().square().sum()) for name, tensor in delta.items()}
    total = sum(sq_norms.values())
    return {group: sum(sq_norms[name] for name in members) / total for group, members in groups.items()}


def _adamw_run(task: Task, data: Data, learning_rate: float) -> dict[str, Point]:
    setting = Setting(learning_rate=learning_rate, rho=0.0)
    model = build(data, setting, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=setting.weight_decay, fused=True)
    loss_fn, points = loss_of(task), {}
    at = {max(1, round(task.steps * share)): name for name, share in _POINTS.items()}
    for step, batch in zip(range(1, max(at) + 1), training_batches(task, data, seed=0), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_at(step - 1, task.steps)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        if step in at:
            points[at[step]] = Point.of(model, optimizer, step)
    return points


def _windows(task: Task, data: Data) -> list[Batch]:
    """Held-back samples in windows of a step's size; of few samples, in several orders."""
    held_back = dataclasses.replace(data, train=data.validation)
    stream = training_batches(task, held_back, seed=0)
    return [next(stream) for _ in range(_NUM_WINDOWS)]


def _parser() -> argparse.ArgumentParser:
    parser = study_parser("screen", __doc__, candidates=_CANDIDATES)
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="RATE", help="of the AdamW run")
    return parser


if __name__ == "__main__":
    logging.getLogger("slsam_ds").setLevel(logging.ERROR)
    raise SystemExit(main())
