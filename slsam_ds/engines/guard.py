"""A loop that was converted by half is refused: it would train without SL-SAM, all layers at once, and say nothing.

What would do so is the backward and the step of a DeepSpeedEngine, and the step of an optimizer, outside of SL-SAM's
own step. Whatever else a loop calls stays as it is: forwards, `zero_grad`, schedulers, saving and loading.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from slsam_ds.engines import is_deepspeed_engine
from slsam_ds.model.param_groups import settings_of
from slsam_ds.shards import local_elements

_STEPPING = ContextVar("slsam_ds takes a step", default=False)


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """Within is a step of SL-SAM, which alone may call what `guard` refuses."""
    token = _STEPPING.set(True)
    try:
        yield
    finally:
        _STEPPING.reset(token)


def is_stepping() -> bool:
    """Whether a step of SL-SAM is under way."""
    return _STEPPING.get()


def guard(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """From here on, what would train the model outside of SL-SAM's step raises a RuntimeError. Twice does no harm.

    Args:
        model: A module, or a DeepSpeedEngine.
        optimizer: The module's; a DeepSpeedEngine has its own.
    """
    stepped: Any = optimizer
    if is_deepspeed_engine(model):
        engine: Any = model
        stepped = engine.optimizer
        _guard_method(engine, "backward")
        _guard_method(engine, "step")
    if isinstance(stepped, torch.optim.Optimizer):
        _guard_optimizer(stepped)
    else:  # one of DeepSpeed's, which have no hooks
        _guard_method(stepped, "step")


def _guard_method(holder: Any, name: str) -> None:
    method = getattr(holder, name)

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not is_stepping():
            raise _refusal(holder, name)
        return method(*args, **kwargs)

    setattr(holder, name, guarded)


def _guard_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """A step outside of ours finds no gradient, or is refused; and it changes nothing.

    The Trainer takes one after ours. Optimizers that count their steps in their groups (schedule-free ones, Prodigy)
    would count twice.
    """
    kept: list[dict[str, Any]] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_stepping():
            _refuse_gradients(optimizer, args, kwargs)
            kept[:] = [settings_of(group) for group in optimizer.param_groups]

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not is_stepping():
            for group, settings in zip(optimizer.param_groups, kept, strict=True):
                group.update(settings_of(settings))  # copies again: a step that calls an inherited one comes here twice

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _refuse_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Let a step pass that finds no gradient.

    And one on zeros at a learning rate of 0, by which `torch.distributed.checkpoint` makes state to load into.
    """
    _, *closure = args
    computes_gradients = any(given is not None for given in (*closure, *kwargs.values()))
    if computes_gradients or (_gradients(optimizer) and not _makes_state(optimizer)):
        raise _refusal(optimizer, "step")


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _makes_state(optimizer: torch.optim.Optimizer) -> bool:
    if any(group.get("lr") for group in optimizer.param_groups):  # None: its own
        return False
    return not any(local_elements(gradient.contiguous()).any() for gradient in _gradients(optimizer))


def _refusal(holder: Any, name: str) -> RuntimeError:
    return RuntimeError(
        f"{type(holder).__name__}.{name}() called outside of SL-SAM's step: it would train without SL-SAM; call "
        "slsam.step(window), which takes the place of forward, backward and step (slsam_ds.windows makes windows of a "
        "data loader)"
    )
