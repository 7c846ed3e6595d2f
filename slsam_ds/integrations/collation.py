"""How many samples a collated batch holds: with pairs it has more rows than samples, and only the collator knows.

TRL's collators of preferences put the rows of all chosen completions before those of all rejected ones.
"""

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

from slsam_ds.model.micro_batches import num_samples

_SIZE = "slsam_num_samples"


class SizedCollator:
    """A collator whose batches also say of how many samples they were made.

    Args:
        collate: The one whose batches they are.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self._collate(samples)
        if isinstance(batch, MutableMapping):
            batch[_SIZE] = len(samples)
        return batch


@contextlib.contextmanager
def sized_batches(trainer: Any) -> Iterator[None]:
    """Within, data loaders that the trainer makes have batches for `take_sizes`."""
    collate = trainer.data_collator
    trainer.data_collator = SizedCollator(collate)
    try:
        yield
    finally:
        trainer.data_collator = collate


def take_sizes(batches: Sequence[Any], batch_size: int) -> list[int] | None:
    """How many samples batches were made of; taken out of them, for no model asks for it.

    Args:
        batches: Of a window.
        batch_size: Samples in a batch, or fewer.

    Returns:
        None where that is not told: for what is no mapping, and for what was streamed.

    Raises:
        ValueError: It is not told, and there are more rows than samples.
    """
    sizes = [batch.pop(_SIZE, None) if isinstance(batch, MutableMapping) else None for batch in batches]
    known = [size for size in sizes if size is not None]
    if len(known) == len(batches):
        return known
    rows = max(map(num_samples, batches), default=0)
    if rows > batch_size:
        raise ValueError(
            f"slsam.ascent_fraction below 1: a batch of {batch_size} samples has {rows} rows, and of streamed data "
            "nobody knows which belong together; use ascent_fraction=1, or data that is not streamed"
        )
    return None
