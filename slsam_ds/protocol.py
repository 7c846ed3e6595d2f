"""What the step asks of an engine: where a shard lives and what must travel. Nothing else.

A new sharding regime implements `Engine` and one case in `slsam_ds.engines.select_engine`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slsam_ds.shards import local_elements

MAX_KEPT_BYTES = 2**30
"""What is gathered for the ascent and kept for the descent takes at most this much, where the engine has no limit of
its own for it."""

ALWAYS = -1
"""Arm number of the parameters that are trained in every step (`other_parameters="always"`)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """This rank's share of an arm, or a part of it. The tensors hold the same elements, 1-D.

    Each may be on a device of its own: what DeepSpeed offloads stays on the host.

    Attributes:
        arm: The arm it belongs to.
        weight: What forward reads, or is cast from; writable in place. In its own dtype.
        master: The same elements in full precision; `weight` itself where there is no master copy.
        stepped: What the optimizer steps, and keeps state of, that holds the master; it may hold more. Any shape.
        owner: The rank that speaks for these elements in sums over ranks. Sharded: this rank. Replicated: one rank
            for all, so that nothing is counted twice and every replica draws the same rounding noise.
        offset: Where in `stepped`, laid flat, the master begins.
        read_dtype: What forward casts `weight` to on its way; None: it reads `weight` as it is.
    """

    arm: int
    weight: Tensor
    master: Tensor
    stepped: Tensor
    owner: int
    offset: int = 0
    read_dtype: torch.dtype | None = None

    def part_of(self, beside: Tensor) -> Tensor:
        """This piece's elements of a tensor that has the shape of `stepped`, in place. 1-D."""
        return local_elements(beside)[self.offset : self.offset + self.weight.numel()]


@dataclass(frozen=True, slots=True)
class Shard:
    """A piece of an active arm with its gradient: the same elements, 1-D.

    Attributes:
        piece: The weights.
        gradient: Mean gradient over the window and all ranks, times the engine's `loss_scale`. What the optimizer will
            read, writable in place.
    """

    piece: Piece
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Elements that follow each other in a piece, or in what is stepped, as they do in the model.

    Attributes:
        start: Where the first one is, laid flat.
        number: Its number in the model: see `LayerMap.numbers`.
        numel: How many.
    """

    start: int
    number: int
    numel: int


class Ranks(Protocol):
    """The ranks that train together."""

    rank: int
    world_size: int

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place. Every rank gets the same bits."""
        ...

    def all_of(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        """Start asking of each flag whether it is true on all ranks; the returned function waits for the answer.

        Args:
            flags: As many on every rank.
        """
        ...

    def check_together(self, check: Callable[[], None]) -> None:
        """Call `check` on every rank. No rank goes on before all have passed, nor where one has failed.

        Raises:
            ValueError: What it raised, or an OSError said, on the first rank where it did.
        """
        ...

    def agree(self, claims: Mapping[str, Any], *, stop: bool = False) -> Callable[[], bool]:
        """Start comparing `claims` with the other ranks; the returned function waits and checks.

        Args:
            claims: By name, the same names on every rank.
            stop: This rank asks to stop.

        Returns:
            A function that tells whether any rank asks to stop. It raises `RanksDisagreeError` on every rank where
            claims differ, naming what differs and which rank holds which value.
        """
        ...


class RanksDisagreeError(RuntimeError):
    """Ranks were about to take different steps."""


class Engine(Protocol):
    """Where shards live and what must travel, for one sharding regime.

    Attributes:
        optimizer_state_home: Where the optimizer's state of a layer waits until the layer is selected again, and its
            master weights where it has such; None: they stay where they were made.
    """

    optimizer_state_home: torch.device | None

    def keep_state_at(self, home: torch.device | None) -> None:
        """From here on, that is `optimizer_state_home`. Called once, before the first step."""
        ...

    @property
    def ranks(self) -> Ranks:
        """The ranks that train together."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's optimizer, under whatever DeepSpeed has put around it. Its state is keyed by `Piece.stepped`."""
        ...

    @property
    def sends_during_backward(self) -> bool:
        """Whether backward itself exchanges weights or gradients, so that ranks must agree before the first one."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank holds whole weights."""
        ...

    @property
    def may_skip_modules(self) -> bool:
        """Whether a forward may leave out modules that an earlier one ran."""
        ...

    @property
    def loss_scale(self) -> float:
        """What `backward` multiplies losses by (float16): gradients are this many times too large. Fixed in a step."""
        ...

    def begin_step(self, ascended: Collection[int], updated: Collection[int]) -> None:
        """A step begins. Gradients that a backward outside of SL-SAM has left are dropped.

        Args:
            ascended: Arms whose gradient the ascent pass finds; empty: there is no ascent pass. The perturbed arms
                are among them.
            updated: Arms whose gradient the descent pass finds. They may be others than those.
        """
        ...

    def begin_ascent(self) -> None:
        """A pass follows in which gradients flow to the ascended arms only, and then writes into their weights.

        What neither pass trains, and the descent reads, may stay gathered until then.
        """
        ...

    def begin_descent(self) -> None:
        """A pass follows in which gradients flow to the updated arms only."""
        ...

    def end_step(self) -> None:
        """Everything that may ever be trained is trainable again. Also comes after a pass that raised."""
        ...

    def begin_micro_batch(self, *, last: bool) -> None:
        """A forward and backward follow; after those of the `last` micro-batch of the window comes `reduce`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient to the window's. `loss` is already weighted; shape ()."""
        ...

    def reduce(self) -> list[Shard]:
        """Average the window's gradients over ranks; the engine keeps them until `discard` or `update`."""
        ...

    def pieces(self, arms: Collection[int]) -> list[Piece]:
        """This rank's shares of these arms, in the order of their elements: what `reduce` gives gradients for."""
        ...

    def runs(self, piece: Piece) -> list[Run]:
        """Which elements of the model a piece holds: the same numbers in every engine. Padding is in no run."""
        ...

    def local_gradients(self) -> AbstractContextManager[list[Shard]]:
        """Within, backward gathers gradients of this rank alone, beside the window's, and nothing travels.

        The list holds them, summed over the passes within, when they are done. Only where weights are replicated.
        """
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply the reduced gradients, which `update` will read, in place."""
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
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        """Step the user's optimizer on these arms with the reduced gradients, or count a skipped step.

        Args:
            arms: Those that have gradients.
            num_micro_batches: Of the window.
            learning_rate_scale: By arm: what this step's learning rate is multiplied by.
            grad_norm: Of all these gradients, over all ranks, the loss scale left out. The host knows that it is
                finite, and need not ask the device again.
            skip: Count a skipped step.

        Returns:
            Whether the update was applied.
        """
        ...
