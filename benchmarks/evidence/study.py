"""Which runs there are to make, and in which order: learning rates first, then what is reported, then single knobs."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence.methods import METHODS, Method
from benchmarks.evidence.runs import Key, Run, Runs, Stage
from benchmarks.evidence.tasks import TASKS, Task

TUNING_SEED = 100
"""No seed of a reported run."""

OFFERED = ("slsam", "single_pass", "adamw_price")
"""The methods that users are offered, the defaults first and then the presets. Knobs are turned of one of them."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A knob turned away from its default.

    Attributes:
        knobs: Of `slsam`, or of `selectors.AROUND`.
        rate: Multiple of the tuned learning rate.
        needs_bfloat16: Whether it does nothing in float32.
    """

    knobs: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    needs_bfloat16: bool = False


KNOBS: dict[str, tuple[Change, ...]] = {
    "learning rate": tuple(Change(rate=rate) for rate in (0.3, 0.5, 2.0)),
    "rho": tuple(Change(knobs={"rho": rho}) for rho in (0.0, 0.01, 0.02, 0.1, 0.2)),
    "active_layers": tuple(Change(knobs={"active_layers": share}) for share in (1, 0.4, 0.7)),
    "update_scale": tuple(Change(knobs={"update_scale": "none"}, rate=rate) for rate in (1.0, 2.0, 5.0)),
    "selector": tuple(Change(knobs={"selector": selector}) for selector in ("uniform", "cyclic", "top_k")),
    "gamma": tuple(Change(knobs={"gamma": gamma}) for gamma in (0.02, 0.3, 0.6)),
    "share": tuple(Change(knobs={"share": share}) for share in (0.0, 0.01, 0.1)),
    "reward": tuple(Change(knobs={"reward": reward}) for reward in ("grad_rms", "grad_norm_per_cost")),
    "reward normalised per layer": (Change(knobs={"normalised_per_arm": 0.99}),),
    "redraw_every": tuple(Change(knobs={"redraw_every": every}) for every in (5, 20)),
    "other_parameters": tuple(Change(knobs={"other_parameters": what}) for what in ("always", "freeze")),
    "budget": tuple(Change(knobs={"budget": budget}) for budget in (0.7, 1.0, 1.2)),
    "rounding": (Change(knobs={"rounding": "nearest"}, needs_bfloat16=True),),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Tasks x methods x seeds.

    Attributes:
        tasks: By name.
        methods: By name.
        stages: In this order for every task.
        num_seeds: Of the final runs, and of the knobs' at most three.
        knobs: Names of `KNOBS`.
        base: The method whose knobs are turned.
        shortened: Divide every run's steps by this; for a first look.
        num_rates: Of each task's learning rates, this many from the middle; None: all.
    """

    tasks: Sequence[str] = tuple(TASKS)
    methods: Sequence[str] = tuple(METHODS)
    stages: Sequence[Stage] = ("tune", "final", "knobs")
    num_seeds: int = 5
    knobs: Sequence[str] = tuple(KNOBS)
    base: str = OFFERED[0]
    shortened: int = 1
    num_rates: int | None = None

    def keys(self, runs: Runs) -> Iterator[Key]:
        """All runs, made or not. What a stage needs of the one before is read from `runs` when it is reached."""
        for name in self.tasks:
            for stage in self.stages:
                yield from getattr(self, f"_{stage}")(TASKS[name], runs)

    def steps(self, key: Key, runs: Runs) -> int:
        """How long a run is.

        Raises:
            LookupError: It depends on how long others took, which were not tuned yet.
        """
        steps = max(2, TASKS[key.task].steps // self.shortened)
        longest = METHODS[key.method].lasts_as_long_as
        if longest is None:
            return steps
        ours, theirs = (
            statistics.median(run.seconds_per_step for run in _tuned(runs, key.task, METHODS[name]))
            for name in (longest, key.method)
        )
        return max(2, round(steps * ours / theirs))

    def _tune(self, task: Task, runs: Runs) -> Iterator[Key]:
        # A learning rate for every method in turn: whatever else the machine does falls on all of them alike.
        names = dict.fromkeys(METHODS[name].tuned_as or name for name in self._with_needed())
        for rate in self._rates(task):
            for name in names:
                yield Key(stage="tune", task=task.name, method=name, learning_rate=rate, seed=TUNING_SEED)

    def _final(self, task: Task, runs: Runs) -> Iterator[Key]:
        for seed in range(self.num_seeds):
            for name in self.methods:
                rate = best_rate(runs, task.name, METHODS[name])
                yield Key(stage="final", task=task.name, method=name, learning_rate=rate, seed=seed)

    def _knobs(self, task: Task, runs: Runs) -> Iterator[Key]:
        rate = best_rate(runs, task.name, METHODS[self.base])
        turned = (change for name in self.knobs for change in KNOBS[name])
        changes = (Change(), *(change for change in turned if task.in_bfloat16 or not change.needs_bfloat16))
        for seed in range(min(3, self.num_seeds)):
            for change in changes:
                yield Key(
                    stage="knobs",
                    task=task.name,
                    method=self.base,
                    learning_rate=rate * change.rate,
                    seed=TUNING_SEED + 1 + seed,
                    knobs=change.knobs,
                )

    def _rates(self, task: Task) -> Sequence[float]:
        rates = task.learning_rates
        if self.num_rates is None or self.num_rates >= len(rates):
            return rates
        start = (len(rates) - self.num_rates) // 2
        return rates[start : start + self.num_rates]

    def _with_needed(self) -> list[str]:
        """The methods, and those whose wall clock others are given, and whose knobs are turned."""
        needed = [METHODS[name].lasts_as_long_as for name in self.methods]
        turned = [self.base] if "knobs" in self.stages else []
        return list(dict.fromkeys([*self.methods, *(name for name in needed if name is not None), *turned]))


QUICK = Study(
    tasks=("digits",),
    methods=("adamw", "dense_sam", "slsam", "budget"),
    stages=("tune", "final"),
    num_seeds=2,
    shortened=3,
    num_rates=2,
)
"""A first look."""


def best_rate(runs: Runs, task: str, method: Method) -> float:
    """The learning rate with the least validation loss.

    Raises:
        LookupError: None was tried.
    """
    return min(_tuned(runs, task, method), key=lambda run: run.loss).key.learning_rate


def _tuned(runs: Runs, task: str, method: Method) -> list[Run]:
    name = method.tuned_as or method.name
    found = runs.of("tune", task, name)
    if not found:
        raise LookupError(f"no learning rate of {name} on {task} was tried yet: add the stage tune")
    return found
