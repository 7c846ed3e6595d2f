"""Where the time of a step goes: forward, backward and what the engine does, pass by pass."""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measure import Effort, count_prices, timed_step
from benchmarks.modes import ADAMW_MODE, DENSE_SAM, EXACT, OVERHEAD, Ours, Stock, Training, build
from benchmarks.setup import Setup
from slsam_ds.model.micro_batches import model_loss
from tests.ranks import run_on_ranks

MODES = (ADAMW_MODE, OVERHEAD, DENSE_SAM, EXACT)
PARTS = (
    "ascent forward",
    "ascent backward",
    "ascent reduction",
    "ascent statistics",
    "publish perturbed weights",
    "forward",
    "backward",
    "reduction",
    "statistics",
    "optimizer step",
    "freezing and clearing",
    "rest",
)
"""In their order. "rest" is what is left of the step: selection, perturbing and restoring, barriers; in AdamW's
backward, reduction is included. Statistics wait for the other ranks."""


def break_down(setup: Setup, effort: Effort) -> dict[str, Any]:
    """Mean seconds by part for each mode, as JSON."""
    found = run_on_ranks(setup.world_size, _measure, setup, effort, timeout=effort.timeout, device=setup.device)[0]
    return {"setup": dataclasses.asdict(setup), "about": setup.describe(), "modes": found}


def _measure(setup: Setup, effort: Effort) -> dict[str, Any]:
    model, data = setup.build()
    trainings = {mode.name: build(mode, copy.deepcopy(model), setup) for mode in MODES}
    costs = count_prices(trainings, data(0))
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
    prices: dict[str, list[float]] = {name: [] for name in trainings}
    for number in range(1, effort.warmup + effort.rounds + 1):
        window = data(number)
        for name, training in trainings.items():
            watch = _Stopwatch(setup)
            with watch.over_parts_of(training):
                seconds, step = timed_step(training, window, setup, loss_fn=watch.timed("forward", model_loss))
            if number > effort.warmup:
                steps[name].append({**watch.seconds, "rest": seconds - sum(watch.seconds.values()), "all": seconds})
                prices[name].append(training.price(costs[name], window, step))
    return {
        name: {
            "flops": statistics.mean(prices[name]),
            "seconds": {part: statistics.mean(step.get(part, 0.0) for step in all_steps) for part in (*PARTS, "all")},
        }
        for name, all_steps in steps.items()
    }


class _Stopwatch:
    """Adds up seconds by part of one step."""

    def __init__(self, setup: Setup) -> None:
        self._on_gpu = setup.device == "cuda"
        self._prefix = ""
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part if part not in _OF_EACH_PASS else self._prefix + part] += self._now() - started

        return run

    @contextlib.contextmanager
    def over_parts_of(self, training: Training) -> Iterator[None]:
        """Within, what the training's engine does is timed."""
        with contextlib.ExitStack() as stack:
            if isinstance(training, Stock) and training._engine is not None:
                for name, part in (("backward", "backward"), ("step", "optimizer step")):
                    stack.enter_context(self._timing(training._engine, name, part))
            elif isinstance(training, Ours):
                self._prefix = "ascent " if training.slsam.config.rho > 0 else ""
                engine = training.slsam.engine
                for name, part in _METHODS.items():
                    stack.enter_context(self._timing(engine, name, part))
                stack.enter_context(self._timing(engine.ranks, "all_reduce", "statistics"))
            yield

    @contextlib.contextmanager
    def _timing(self, holder: Any, name: str, part: str) -> Iterator[None]:
        timed = self.timed(part, getattr(holder, name))

        def run(*args: Any, **kwargs: Any) -> Any:
            result = timed(*args, **kwargs)
            if name == "publish":  # what follows is the descent
                self._prefix = ""
            return result

        vars(holder)[name] = run
        try:
            yield
        finally:
            del vars(holder)[name]

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


_METHODS = {
    "backward": "backward",
    "reduce": "reduction",
    "publish": "publish perturbed weights",
    "update": "optimizer step",
    "begin_ascent": "freezing and clearing",
    "begin_descent": "freezing and clearing",
    "end_step": "freezing and clearing",
    "discard": "freezing and clearing",
}
_OF_EACH_PASS = ("forward", "backward", "reduction", "statistics")
