"""Nests with tensors in them: micro-batches, and what modules return.

A nest is made of mappings (also `BatchEncoding` and `ModelOutput`), lists, tuples, named tuples (also `PackedSequence`)
and dataclasses, as torch's pinning of memory and accelerate's `send_to_device` know them. One that is changed stays of
its kind, with what else it holds, so that its attributes can still be asked for.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest, in its order."""
    if isinstance(nest, Tensor):
        yield nest
    for item in _items(nest).values():
        yield from tensors_in(item)


def map_tensors(nest: Any, change: Callable[[Any], Any], *, whole: Callable[[Any], bool] | None = None) -> Any:
    """The nest with every tensor changed; what else is in it stays as it is.

    Args:
        nest: Is not changed itself.
        change: Of a tensor.
        whole: Says of a part of the nest that it is given to `change` as it is.
    """
    if isinstance(nest, Tensor) or (whole is not None and whole(nest)):
        return change(nest)
    items = _items(nest)
    changed = {key: map_tensors(item, change, whole=whole) for key, item in items.items()}
    return _rebuilt(nest, changed) if items else nest


def _items(nest: Any) -> Mapping[Any, Any]:
    """What a nest holds, by its keys, places or fields; nothing, where it is none."""
    if isinstance(nest, Mapping):
        return nest
    if isinstance(nest, (list, tuple)):
        return dict(enumerate(nest))
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return {field.name: getattr(nest, field.name) for field in dataclasses.fields(nest)}
    return {}


def _rebuilt(nest: Any, items: Mapping[Any, Any]) -> Any:
    """A nest like this one that holds these items."""
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return nest._make(items.values())  # type: ignore[attr-defined]
    if isinstance(nest, (list, tuple)):
        return type(nest)(items.values())
    if isinstance(nest, Mapping) and not isinstance(nest, MutableMapping):
        return dict(items)
    another = copy.copy(nest)
    for key, item in items.items():
        if isinstance(another, MutableMapping):
            another[key] = item
        else:
            object.__setattr__(another, key, item)  # a dataclass may be frozen
    return another
