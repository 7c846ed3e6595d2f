"""Micro-batches: grouping them into windows, moving them to the device, and the loss of one."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from slsam_ds.model.nests import map_tensors, tensors_in

LossFunction = Callable[[Any, Any], Tensor]
"""`loss_fn(model, micro_batch)` → the mean loss of the micro-batch, shape ()."""


def windows(loader: Iterable[Any], length: int, *, drop_last: bool = False) -> Iterator[list[Any]]:
    """Group a loader's micro-batches into windows, one per optimizer step.

    Args:
        loader: Yields micro-batches.
        length: Micro-batches per window: the gradient accumulation steps.
        drop_last: Drop the last window if it is shorter. Otherwise it is averaged over the micro-batches it has.
    """
    if length < 1:
        raise ValueError(f"length={length}: a window needs at least one micro-batch")
    window: list[Any] = []
    for micro_batch in loader:
        window.append(micro_batch)
        if len(window) == length:
            yield window
            window = []
    if window and not drop_last:
        yield window


def model_loss(model: Any, micro_batch: Any) -> Tensor:
    """The loss that a transformers model computes itself.

    Raises:
        ValueError: The micro-batch is no mapping, or holds no labels.
    """
    if not isinstance(micro_batch, Mapping):
        raise ValueError(f"a micro-batch of type {type(micro_batch).__name__}: give a dict of tensors, or a loss_fn")
    output = model(**micro_batch)
    loss: Tensor | None = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError("the model returned no loss: put labels into the micro-batches, or give a loss_fn")
    return loss


def check_loss(loss: Any) -> None:
    """Refuse what backward could not start from.

    Raises:
        ValueError: Not a tensor of shape (), or one without a gradient.
    """
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise ValueError(f"the loss must be a tensor of shape (), got {getattr(loss, 'shape', type(loss).__name__)}")
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not depend on any active layer; with reentrant gradient checkpointing, use "
            "use_reentrant=False or call model.enable_input_require_grads()"
        )


def first_samples(micro_batch: Any, share: float, size: int | None = None) -> Any:
    """The first samples of a micro-batch, at least one; the micro-batch itself where it cannot be divided.

    A pair may be two rows: those of all chosen completions, then those of all rejected ones, as TRL puts them.

    Args:
        micro_batch: A nest. Where all its tensors have the same first dimension, that counts the samples; anything else
            in it is kept as it is.
        share: Of the samples, in (0, 1].
        size: How many samples it has, where that is known: each may then be a pair of rows.
    """
    length = num_samples(micro_batch, size)
    kept = num_kept(share, length)

    def divide(tensor: Tensor) -> Tensor:
        halves = torch.split(tensor, length)
        return tensor[:kept] if len(halves) == 1 else torch.cat([half[:kept] for half in halves])

    return micro_batch if kept == length else map_tensors(micro_batch, divide)


def num_samples(micro_batch: Any, size: int | None = None) -> int:
    """How many samples a micro-batch can be divided into: the rows of all its tensors; 0 where nobody can tell.

    `size`: As for `first_samples`. Of pairs all rows are there twice, but for numbers that a pair has once.
    """
    tensors = list(tensors_in(micro_batch))
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if size is None or lengths == {size}:
        return lengths.pop() if len(lengths) == 1 else 0
    of_rows = {len(tensor) for tensor in tensors if tensor.ndim > 1}
    return size if of_rows == {2 * size} and lengths <= {size, 2 * size} else 0


def num_kept(share: float, num_samples: int) -> int:
    """How many samples a share of so many is: at least one; none of what cannot be divided."""
    return min(num_samples, max(1, round(share * num_samples)))


def ascent_part(fraction: float, num_micro_batches: int, *, of_each: bool) -> tuple[int, float]:
    """What of a window makes up a fraction: so many micro-batches, as few as will do, and this share of each.

    Equal shares need no weights, and as many micro-batches on every rank keep collectives in step.

    Args:
        fraction: Of the window, in (0, 1].
        num_micro_batches: Of the window.
        of_each: Every micro-batch has a part in it.
    """
    wanted = fraction * num_micro_batches
    num = num_micro_batches if of_each else math.ceil(wanted - 1e-9)
    return num, wanted / num


def is_whole(share: float) -> bool:
    """Whether a share of each micro-batch, as `ascent_part` gives it, is all of it."""
    return math.isclose(share, 1.0)


def to_device(nest: Any, device: torch.device) -> Any:
    """The nest on `device`: its tensors, and what knows by itself how to go there, like a `PackedSequence`."""

    def move(part: Any) -> Any:
        try:
            return part.to(device, non_blocking=True)
        except TypeError:  # of one's own, perhaps
            return part.to(device)

    return map_tensors(nest, move, whole=lambda part: callable(getattr(part, "to", None)))
