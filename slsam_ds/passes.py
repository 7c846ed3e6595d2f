"""The forwards and backwards of a step: over the window, or over the part of it that the ascent takes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsam_ds.model.micro_batches import ascent_part, first_samples, is_whole
from slsam_ds.model.prefix import Prefix
from slsam_ds.plan import Plan
from slsam_ds.protocol import Engine

ForwardBackward = Callable[[Any], Tensor]
"""Runs one micro-batch and calls `engine.backward` on its weighted loss; returns that loss, detached, shape ()."""

BeginPass = Callable[[Sequence[Any]], ForwardBackward]
"""Given all micro-batches of a pass, what runs one of them, weighted so that the losses add up to that of the pass."""


@dataclass(frozen=True, slots=True)
class Part:
    """What climbs by itself: the window, or with `ascent_scope="micro_batch"` each of its micro-batches.

    Attributes:
        start: Place in the window of its first micro-batch.
        num_left: Micro-batches of the window from there on.
        descended: The micro-batches to descend on: the first ones, where these are not all.
        climbed: What of them to climb on.
    """

    start: int
    num_left: int
    descended: Sequence[Any]
    climbed: Sequence[Any]


class Passes:
    """Runs the two passes of one step, and hands the prefix of the ascent on to the descent.

    Args:
        engine: Gets the backwards.
        plan: Of the step.
        window: Micro-batches of this rank.
        begin_pass: Runs them.
        prefix: The blocks that the descent need not run again; None: it runs all.
        sizes: See `SLSAM.step_with`.

    Attributes:
        stop_requested: Any rank asked to stop; known after `await_agreement`.
        weight_of_part: Of losses and gradients of the part that is descended on: 1 where they are means over it, its
            share of the window where they are weighted as in that.
        part_is_apart: It consists of samples, not of whole micro-batches: the pass over the window runs them again.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        window: Sequence[Any],
        begin_pass: BeginPass,
        prefix: Prefix | None,
        sizes: Sequence[int] | None,
    ) -> None:
        self._engine, self._plan, self._prefix = engine, plan, prefix
        self._window, self._climbed = window, _climbed_of(window, plan, sizes)
        self._descended, in_window = _descended_of(window, plan, sizes)
        self.weight_of_part = plan.ascent_fraction if plan.descends_on_part and in_window else 1.0
        self.part_is_apart = not in_window
        self._descend_on = begin_pass(window if in_window else self._descended)
        self._climb_on = begin_pass(self._climbed) if self._climbed is not window or not in_window else self._descend_on
        # The comparison starts here and is awaited before the first gradient travels: it hides behind the passes.
        self._agreement = engine.ranks.agree(plan.claims, stop=plan.stop)
        self._reusable_everywhere: Callable[[], Sequence[bool]] | None = None
        self.stop_requested = False

    def parts(self) -> list[Part]:
        """The parts of the window, in their order."""
        length = len(self._window)
        if self._plan.scope != "micro_batch":
            return [Part(0, len(self._descended), self._descended, self._climbed)]
        pairs = zip(self._window, self._climbed, strict=True)
        return [Part(place, length - place, [whole], [climbed]) for place, (whole, climbed) in enumerate(pairs)]

    def ascend(self, part: Part) -> Tensor:
        """Gather the gradient at x. Returns the loss: shape (), float64, local."""
        kept_whole = all(one is other for one, other in zip(self._climbed, self._window, strict=False))
        around = self._prefix.kept if self._prefix is not None and kept_whole else _as_it_is
        return self._run(part.climbed, self._climb_on, around, start=part.start, num_left=len(part.climbed))

    def ascend_first(self, part: Part) -> Tensor:
        """The same on what is descended on."""
        around = self._prefix.kept if self._prefix is not None else _as_it_is
        return self._run(part.descended, self._descend_on, around, start=part.start, num_left=len(part.descended))

    def ascend_rest(self, part: Part) -> Tensor:
        """And on the others, or on the window where what was descended on is none of its micro-batches."""
        rest = self._window if self.part_is_apart else self._window[len(part.descended) :]
        return self._run(rest, self._climb_on, _as_it_is, start=len(self._window) - len(rest), num_left=len(rest))

    def descend(self, part: Part) -> Tensor:
        """Add the gradient at the weights as they are now to the window's. Returns the loss: likewise."""
        self._forget_what_others_run()
        around = self._prefix.reused if self._prefix is not None else _as_it_is
        return self._run(part.descended, self._descend_on, around, start=part.start, num_left=part.num_left)

    def try_first(self, part: Part, *, reuse: bool) -> Tensor:
        """As `descend`, of the part's first micro-batch alone; whether it starts above the prefix is said."""
        around = self._prefix.tried if reuse and self._prefix is not None else _as_it_is
        return self._run(part.descended[:1], self._descend_on, around, start=part.start, num_left=1)

    def await_agreement(self) -> None:
        """Wait until it is known that all ranks are about to take the same step.

        Raises:
            RanksDisagreeError: They are not.
        """
        self.stop_requested = self._agreement()

    def share_reusable(self) -> None:
        """Start asking which micro-batches every rank can start above the prefix.

        Where weights are sharded, all ranks must gather for the blocks below, or none.
        """
        if self._engine.may_skip_modules and not self._engine.replicated:
            prefix, numbers = self._prefix, range(len(self._window))
            flags = [prefix is not None and prefix.reusable(number) for number in numbers]
            self._reusable_everywhere = self._engine.ranks.all_of(flags)

    def _forget_what_others_run(self) -> None:
        if self._prefix is not None and self._reusable_everywhere is not None:
            for number, reusable in enumerate(self._reusable_everywhere()):
                if not reusable:
                    self._prefix.forget(number)

    def _run(
        self,
        micro_batches: Sequence[Any],
        forward_backward: ForwardBackward,
        around: Callable[[int], AbstractContextManager[None]],
        *,
        start: int,
        num_left: int,
    ) -> Tensor:
        """Sum of the weighted losses. `num_left`: micro-batches up to the reduction, these among them."""
        if self._engine.sends_during_backward:
            self.await_agreement()
        torch.clear_autocast_cache()  # one around the step would go on with the weights that it cast before they moved
        loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        for place, micro_batch in enumerate(micro_batches):
            self._engine.begin_micro_batch(last=place == num_left - 1)
            with around(start + place):
                loss += forward_backward(micro_batch)
        return loss


def _climbed_of(window: Sequence[Any], plan: Plan, sizes: Sequence[int] | None) -> Sequence[Any]:
    """What of the window the ascent takes."""
    if plan.ascent_fraction == 1 or plan.descends_on_part:
        return window
    return _first_of(
        window, *ascent_part(plan.ascent_fraction, len(window), of_each=plan.scope == "micro_batch"), sizes
    )


def _descended_of(window: Sequence[Any], plan: Plan, sizes: Sequence[int] | None) -> tuple[Sequence[Any], bool]:
    """What of the window the descent takes, and whether it is whole micro-batches."""
    if not plan.descends_on_part:
        return window, True
    num, share = ascent_part(plan.ascent_fraction, len(window), of_each=False)
    return (window[:num], True) if is_whole(share) else (_first_of(window, num, share, sizes), False)


def _first_of(window: Sequence[Any], num: int, share: float, sizes: Sequence[int] | None) -> Sequence[Any]:
    """The first samples of so many micro-batches, this share of each."""
    size_of = dict(enumerate(sizes or ()))
    return [first_samples(window[place], share, size_of.get(place)) for place in range(num)]


@contextlib.contextmanager
def _as_it_is(number: int) -> Iterator[None]:
    yield
