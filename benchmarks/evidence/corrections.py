"""What a recipe would change about AdamW's descent, at weights that an AdamW run has come to.

The recipe takes real steps through `SLSAM.step`, with a learning rate that moves nothing, and what it hands to the
optimizer is read there: so every preset and combination of knobs is covered, and nothing is computed twice.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slsam_ds import SLSAM
from slsam_ds.plan import StepResult
from slsam_ds.state.progress import Progress

Vector = dict[str, Tensor]
"""By parameter's name; none where there is nothing."""

_NO_RATE = 1e-30  # what it moves is lost in rounding, but for zeros, which it moves by nothing that matters


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where an AdamW run has come to.

    Attributes:
        step: After so many steps.
        weights: Of the model.
        moments: The optimizer's state, by parameter's name.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> "Point":
        """A copy."""
        return cls(
            step=step,
            weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
            moments={
                name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
                for name, parameter in model.named_parameters()
            },
        )

    def in_adams_units(self, vector: Mapping[str, Tensor]) -> Vector:
        """A gradient as Adam makes a step of it: divided by the root of its second moment."""
        return {name: tensor / (self.moments[name]["exp_avg_sq"].sqrt() + 1e-8) for name, tensor in vector.items()}

    def put_into(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go there; the optimizer's steps move nothing from then on."""
        model.load_state_dict(self.weights)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {key: value.clone() for key, value in self.moments[name].items()}
        for group in optimizer.param_groups:
            group["lr"] = _NO_RATE


@dataclass(frozen=True, kw_only=True)
class Handed:
    """What the optimizer was given in one step.

    Attributes:
        gradient: Of the updated parameters.
        price: Whatever the caller's price of the step is.
    """

    gradient: Vector
    price: float


def handed(
    slsam: SLSAM,
    windows: Sequence[Sequence[Any]],
    loss_fn: Any,
    *,
    after: int,
    price_of: Callable[[Sequence[Any], StepResult], float],
) -> Iterator[Handed]:
    """Step over the windows, and tell of each what the optimizer was given.

    Args:
        slsam: The recipe, its optimizer at a `Point`.
        windows: Of a step each.
        loss_fn: As for `SLSAM.step`.
        after: Steps taken before.
        price_of: What a step over a window cost.
    """
    slsam.progress = Progress.start(len(slsam.layers), after=after)
    with _reading(slsam) as seen:
        for window in windows:
            result = slsam.step(window, loss_fn)
            yield Handed(gradient=dict(seen), price=price_of(window, result))
            seen.clear()


@contextmanager
def _reading(slsam: SLSAM) -> Iterator[Vector]:
    """Within, the gradients that the optimizer is called with."""
    names = {parameter: name for name, parameter in slsam.model.named_parameters()}
    seen: Vector = {}

    def read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    seen[names[parameter]] = parameter.grad.detach().clone()

    hook = slsam.engine.optimizer.register_step_pre_hook(read)
    try:
        yield seen
    finally:
        hook.remove()


class MeanCorrection:
    """d: what a recipe descends along, less the gradient at the weights over the same window; the mean over windows.

    A parameter counts in those windows in which it was updated. That is what a learning rate times 1/p makes of a
    sampled recipe in expectation (`update_scale`), and what a tuned rate makes of one without.
    """

    def __init__(self) -> None:
        self._sums: Vector = {}
        self._counts: dict[str, int] = {}

    def add(self, descended: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> None:
        """One window's."""
        for name, tensor in descended.items():
            difference = tensor - gradient[name]
            self._sums[name] = self._sums[name] + difference if name in self._sums else difference
            self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self) -> Vector:
        """By parameter; those never updated are missing."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


@dataclass(frozen=True, kw_only=True)
class Captured:
    """How much of dense SAM's correction another one has.

    Attributes:
        projection: ⟨d, delta⟩ / ‖delta‖²: 1 for dense SAM itself, 0 for AdamW.
        cosine: Of the angle between them; nan where one is zero.
    """

    projection: float
    cosine: float


def captured(correction: Mapping[str, Tensor], delta: Mapping[str, Tensor], names: Collection[str]) -> Captured:
    """Over some parameters; a parameter without a correction has none.

    Args:
        correction: d.
        delta: Dense SAM's.
        names: Which parameters.
    """
    product = math.fsum(_dot(correction[name], delta[name]) for name in names if name in correction)
    of_delta = math.fsum(_dot(delta[name], delta[name]) for name in names)
    of_correction = math.fsum(_dot(correction[name], correction[name]) for name in names if name in correction)
    norms = math.sqrt(of_delta * of_correction)
    return Captured(
        projection=product / of_delta if of_delta > 0 else math.nan, cosine=product / norms if norms > 0 else math.nan
    )


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())
