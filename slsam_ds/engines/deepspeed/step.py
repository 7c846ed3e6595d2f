"""DeepSpeed's own `engine.step()`, run over a view that holds the sampled arms alone.

Counters, timers, monitor, loss scale and learning-rate scheduler keep the meaning that they have in a stock loop.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from slsam_ds.engines.arms import SwitchesArms
from slsam_ds.model.param_groups import scaled_learning_rates, stepped_parameters
from slsam_ds.model.state_home import by_group


class DeepSpeedStep(SwitchesArms):
    """`Engine.update` for the engines whose optimizer is stepped by a DeepSpeedEngine."""

    _engine: DeepSpeedEngine

    def begin_step(self, ascended: Collection[int], updated: Collection[int]) -> None:
        super().begin_step(ascended, updated)
        timer = self._engine.tput_timer
        timer.start()
        # Else each forward would start it anew, and wait for the device: of a step it would see what its last one took.
        timer.start = _keep_going

    def end_step(self) -> None:
        super().end_step()
        timer = self._engine.tput_timer
        vars(timer).pop("start", None)
        timer.started = False  # where the step raised

    def update(
        self,
        arms: Collection[int],
        *,
        num_micro_batches: int,
        learning_rate_scale: Mapping[int, float],
        grad_norm: float,
        skip: bool,
    ) -> bool:
        # One engine.step() per micro-batch, as in a stock loop, keeps DeepSpeed's counters, timers, monitor and
        # scheduler at their usual meaning; only the last one is a boundary and steps the optimizer.
        timer = self._engine.tput_timer
        with boundary(self._engine, False), overlaid(timer, "stop", functools.partial(_count_micro_step, timer)):
            for _ in range(num_micro_batches - 1):
                self._engine.step()
        with boundary(self._engine, True), self._sparse_optimizer_step(arms, learning_rate_scale, skip):
            self._engine.step()
        return not self._engine.optimizer.overflow

    @abstractmethod
    def _narrowed_to(self, arms: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """Within, the engine's optimizer and the one inside it consist of these arms' groups alone."""

    def _stepped(self, arms: Collection[int]) -> list[Tensor]:
        """What the inner optimizer steps for these arms on this rank: master weights, whole or partitions."""
        optimizer = self._engine.optimizer
        return stepped_parameters(getattr(optimizer, "optimizer", optimizer), arms)

    @abstractmethod
    def _after_step(self, arms: Collection[int]) -> None:
        """The optimizer has stepped these arms."""

    @contextlib.contextmanager
    def _sparse_optimizer_step(
        self, arms: Collection[int], learning_rate_scale: Mapping[int, float], skip: bool
    ) -> Iterator[None]:
        """Within, the `optimizer.step()` that engine.step() calls steps these arms alone, or reports an overflow.

        Only that one call sees the view: the scheduler, which engine.step() advances right after, sees all groups.
        """
        optimizer = self._engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        stock_step = optimizer.step

        @functools.wraps(stock_step)  # torch's schedulers know the step that they have wrapped by an attribute
        def step(*args: Any, **kwargs: Any) -> None:
            if skip:
                _report_overflow(optimizer, inner)
                return
            optimizer.overflow = False
            home, is_bare = self.optimizer_state_home, optimizer is inner
            by_layer = by_group(inner, stock_step if is_bare else inner.step, home=home)
            with (
                self._narrowed_to(arms),
                scaled_learning_rates(inner.param_groups, learning_rate_scale),
                self._masters.fetched(self._stepped(arms)),  # before the state, which goes to where they are
                contextlib.nullcontext() if is_bare else overlaid(inner, "step", by_layer),
            ):
                (by_layer if is_bare else stock_step)(*args, **kwargs)
            if not optimizer.overflow:
                self._after_step(arms)

        # Without ZeRO, in float32, the engine clips before it steps, and raises where there is no gradient to clip.
        unclipped = overlaid(self._engine, "clip_fp32_gradients", lambda: None) if skip else contextlib.nullcontext()
        with overlaid(optimizer, "step", step), unclipped:
            yield


def _keep_going() -> None:
    """In the place of the throughput timer's start, while it runs."""


def _count_micro_step(timer: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of its stop, within a window: it runs until the window's end."""
    timer.micro_step_count += 1


def _report_overflow(optimizer: Any, inner: Any) -> None:
    """What `step` leaves behind when it finds an overflow: the engine counts a skipped step, the scheduler waits.

    A dynamic loss scale backs off. `optimizer` is DeepSpeed's around `inner`; or, in float32 without ZeRO, `inner`.
    """
    optimizer.overflow = True
    if optimizer is not inner:
        optimizer._global_grad_norm = float("inf")
        optimizer._update_scale(True)
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def boundary(engine: DeepSpeedEngine, is_boundary: bool) -> Iterator[None]:
    """Within, DeepSpeed takes this for the last micro-batch of its window, or for another one."""
    previous = engine._is_gradient_accumulation_boundary  # may be None: DeepSpeed counts by itself
    try:
        engine.set_gradient_accumulation_boundary(is_boundary)
        yield
    finally:
        engine.set_gradient_accumulation_boundary(previous)


@contextlib.contextmanager
def narrowed(
    holder: Any, keep: Sequence[int], *, lists: Collection[str], dicts: Collection[str] = ()
) -> Iterator[None]:
    """Within, these containers of `holder` have only the entries `keep`, renumbered from 0.

    Entries rebound inside are carried back into the original containers, which others hold on to.
    """
    whole_lists = {name: getattr(holder, name) for name in lists}
    whole_dicts = {name: getattr(holder, name) for name in dicts}
    try:
        for name, whole in whole_lists.items():
            setattr(holder, name, [whole[group] for group in keep])
        for name, whole in whole_dicts.items():
            setattr(holder, name, {place: whole[group] for place, group in enumerate(keep) if group in whole})
        yield
    finally:
        for name, whole in whole_lists.items():
            for group, value in zip(keep, getattr(holder, name), strict=True):
                whole[group] = value
            setattr(holder, name, whole)
        for name, whole in whole_dicts.items():
            shown = getattr(holder, name)
            for place, group in enumerate(keep):
                if place in shown:
                    whole[group] = shown[place]
                else:
                    whole.pop(group, None)
            setattr(holder, name, whole)


@contextlib.contextmanager
def overlaid(holder: Any, name: str, value: Any) -> Iterator[None]:
    """Within, another value of an attribute; afterwards the holder is as it was, a class's attribute shows again."""
    own = vars(holder)
    had, stock = name in own, own.get(name)
    try:
        setattr(holder, name, value)
        yield
    finally:
        if had:
            setattr(holder, name, stock)
        else:
            delattr(holder, name)
