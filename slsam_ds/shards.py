"""What a rank holds of a tensor, and what all ranks hold together."""

import torch
from torch import Tensor


def local_elements(tensor: Tensor) -> Tensor:
    """This rank's elements, in place, 1-D: FSDP2's tensors stand for all ranks', and hold a shard of their own."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape over all ranks.

    ZeRO-3 leaves an empty tensor where it partitions a parameter, and notes on it what it was. Tensors of FSDP2 have
    the shape of the whole.
    """
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))
