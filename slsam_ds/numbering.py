"""The number that each element has in the model: the same in every engine, whatever the sharding."""

import torch
from torch import Tensor

from slsam_ds.protocol import Engine, Piece


def numbers_of(engine: Engine, piece: Piece, start: int, stop: int, device: torch.device) -> Tensor:
    """Of some elements of a piece: see `LayerMap.numbers`.

    Args:
        engine: Knows where the piece is in the model.
        piece: This rank's.
        start: The first element, counted from the piece's first.
        stop: And one after the last.
        device: Where to.

    Returns:
        -1 for padding. int64, shape (stop - start,).
    """
    numbers = torch.full((stop - start,), -1, dtype=torch.int64, device=device)
    for run in engine.runs(piece):
        first, last = max(run.start, start), min(run.start + run.numel, stop)
        if first < last:
            number = run.number + first - run.start
            torch.arange(number, number + last - first, out=numbers[first - start : last - start])
    return numbers
