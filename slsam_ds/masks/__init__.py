"""Which elements of the perturbed arms move: Sparse SAM's masks.

A new mask is a file with a subclass of `Mask` and an entry in `MASKS`.
"""

from collections.abc import Mapping
from typing import Any

from slsam_ds.masks.dynamic import Dynamic
from slsam_ds.masks.fisher import Fisher
from slsam_ds.masks.mask import MASK_KEY, Mask

__all__ = ["MASKS", "MASK_KEY", "Mask", "make_mask"]

MASKS: Mapping[str, type[Mask]] = {
    "fisher": Fisher,
    "dynamic": Dynamic,
}
"""The values of the knob `mask`, besides null."""


def make_mask(name: str | None, engine: Any, numels: Mapping[int, int], **settings: Any) -> Mask | None:
    """The mask that the knob `mask` names; None: every element moves.

    Args:
        name: The knob's value.
        engine: As for `Mask`.
        numels: Likewise.
        **settings: Likewise.

    Raises:
        ValueError: A mask that needs the length of the run and was not given it.
    """
    return None if name is None else MASKS[name](engine, numels, **settings)
