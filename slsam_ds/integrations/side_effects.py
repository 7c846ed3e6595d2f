"""What computing a loss does besides, and how to take it back: SL-SAM computes each one twice."""

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_NUMBERS = (int, float)
_SEQUENCES = (list, deque)
_MAPPINGS = (dict, defaultdict, Counter)


@contextlib.contextmanager
def counted_once(*owners: object) -> Iterator[None]:
    """Put counters and records back to what they were before, in place.

    TRL's trainers append their metrics and add up tokens in `compute_loss`, and so do trainers that people derive.

    Args:
        *owners: Objects whose attributes are put back where they are numbers, or lists or dicts, also nested dicts.
            Others, and attributes that are new, stay as they are.
    """
    saved = [(owner, name, _record(value)) for owner in owners for name, value in vars(owner).items() if _holds(value)]
    try:
        yield
    finally:
        for owner, name, put_back in saved:
            setattr(owner, name, put_back())


@contextlib.contextmanager
def kept_trainable(*modules: nn.Module) -> Iterator[None]:
    """Put `requires_grad` of every parameter back to what it was before.

    PEFT makes all adapters trainable on leaving `disable_adapter`, by which DPO gets at its reference model.
    """
    flags = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in flags:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)


def _holds(value: Any) -> bool:
    """Whether this is something to count with. Exact types: others may not take being cleared and filled."""
    return type(value) in (*_NUMBERS, *_SEQUENCES, *_MAPPINGS)


def _record(value: Any) -> Callable[[], Any]:
    """A function that gives back the very object, with what it holds now."""
    if type(value) in _MAPPINGS:
        items = {key: _record(item) for key, item in value.items()}

        def refill() -> Any:
            contents = {key: put_back() for key, put_back in items.items()}
            value.clear()
            value.update(contents)
            return value

        return refill
    if type(value) in _SEQUENCES:
        elements = list(value)

        def restock() -> Any:
            value.clear()
            value.extend(elements)
            return value

        return restock
    return lambda: value
