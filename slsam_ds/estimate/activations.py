"""How many bytes a forward leaves behind for its backward: counted through autograd's hooks, also on meta tensors."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slsam_ds.estimate.draws import Draw


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Bytes that a forward saves, by who is trained. Exact where a place has one arm; else at most so many.

    Attributes:
        base: By arm, if it is the lowest.
        share: By arm, if it is trained.
        place: By arm: which block it is in, or before or after them.
        most: By place: what all of its arms save together. Some save the same: queries, keys and values their input.
    """

    base: tuple[float, ...]
    share: tuple[float, ...]
    place: tuple[int, ...]
    most: Mapping[int, float]

    def of(self, sample: Sequence[int]) -> float:
        """Of one sample."""
        return self.mean(Draw.of(sample, len(self.base)))

    def mean(self, draw: Draw) -> float:
        """On average."""
        added: Counter[int] = Counter()
        for place, share, chance in zip(self.place, self.share, draw.included, strict=True):
            added[place] += chance * share  # type: ignore[assignment]
        return self.base[draw.lowest] + sum(min(self.most[place], found) for place, found in added.items())


class SavedActivations:
    """What autograd keeps of the forwards run within `watch`: each storage once, weights left out.

    Attributes:
        place: Where in the model the forward is: whoever watches moves it on. A storage that several places save
            counts for the last of them, which needs it whenever an earlier one does.
    """

    def __init__(self) -> None:
        self.place = 0
        # Held on to, so that no storage takes the name of one that is gone. Meta tensors have no address to go by.
        self._saved: dict[int, tuple[int, torch.UntypedStorage]] = {}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Within, what is saved is counted. Leaves the sums of what came before alone."""
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
            yield

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(self.by_place().values())

    def by_place(self) -> Counter[int]:
        """Bytes by place."""
        found: Counter[int] = Counter()
        for place, storage in self._saved.values():
            found[place] += storage.nbytes()
        return found

    def _count(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            self._saved[storage._cdata] = (self.place, storage)
        return tensor
