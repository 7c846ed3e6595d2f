"""What the step asks of an engine: where a shard lives and what must travel. Nothing else.

A new sharding regime implements `Engine` and one case in `slsam_ds.engines.select_engine`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ALWAYS = -1
"""Arm number of the parameters that are trained in every step (`other_parameters="always"`)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's piece of an active arm. The three tensors hold the same elements, 1-D.

    Attributes:
        arm: The arm it belongs to.
        weight: What forward reads, writable in place. In its own dtype.
        master: The same elements in full precision; `weight` itself where there is no master copy.
        gradient: Mean gradient over the window and all ranks.
        owner: The rank that speaks for these elements in sums over ranks. Sharded: this rank. Replicated: one rank
            for all, so that nothing is counted twice and every replica draws the same rounding noise.
    """

    arm: int
    weight: Tensor
    master: Tensor
    gradient: Tensor
    owner: int


class Ranks(Protocol):
    """The ranks that train together."""

    rank: int
    world_size: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place. Every rank gets the same bits."""
        ...

    def agree(self, claims: Mapping[str, Any]) -> Callable[[], None]:
        """Start comparing `claims` with the other ranks; the returned function waits and checks.

        Raises (the returned function, on every rank):
            RanksDisagreeError: Naming what differs and which rank holds which value.
        """
        ...


class RanksDisagreeError(RuntimeError):
    """Ranks were about to take different steps."""


class Engine(Protocol):
    """Where shards live and what must travel, for one sharding regime."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that train together."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def activate(self, arms: Collection[int] | None) -> None:
        """Let gradients flow to these arms only; None: to all of them, the state between steps."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient to the window's. `loss` is already weighted; shape ()."""
        ...

    def reduce(self) -> list[Shard]:
        """Average the window's gradients over ranks; the engine keeps them until `discard` or `update`."""
        ...

    def discard(self) -> None:
        """Forget the gradients gathered so far."""
        ...

    def live_weights(self, arms: Collection[int]) -> list[Tensor]:
        """Every tensor on this rank that perturbing these arms will change."""
        ...

    def publish(self, arms: Collection[int]) -> None:
        """Bring this rank's written weight shards to wherever forward reads them."""
        ...

    def update(
        self, arms: Collection[int], *, num_micro_batches: int, learning_rate_scale: Mapping[int, float], skip: bool
    ) -> bool:
        """Step the user's optimizer on these arms with the reduced gradients, or count a skipped step.

        Returns:
            Whether the update was applied.
        """
        ...
