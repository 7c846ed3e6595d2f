"""A rank's own elements of a tensor."""

from torch import Tensor


def local_elements(tensor: Tensor) -> Tensor:
    """This rank's elements, in place, 1-D: FSDP2's tensors stand for all ranks', and hold a shard of their own."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).view(-1)
