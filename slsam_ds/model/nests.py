"""Nests of mappings, lists and tuples with tensors in them: micro-batches, and what modules return."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(nest: Any) -> Iterator[Tensor]:
    """Every tensor in a nest, in its order."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, (Mapping, list, tuple)):
        for item in nest.values() if isinstance(nest, Mapping) else nest:
            yield from tensors_in(item)


def map_tensors(nest: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The nest with every tensor changed; a mapping becomes a dict, and what else is in it stays as it is."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        return {key: map_tensors(item, change) for key, item in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(item, change) for item in nest)
    return nest


def holds_mapping(nest: Any) -> bool:
    """Whether a mapping is anywhere in the nest: `map_tensors` would make a plain dict of it."""
    return isinstance(nest, Mapping) or (isinstance(nest, (list, tuple)) and any(map(holds_mapping, nest)))
