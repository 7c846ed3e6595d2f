"""The numbers of a step: norms of gradients by arm, added up on the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from slsam_ds.protocol import Shard

# Squared norms are taken of so many elements at once and added up in float64: on the CPU, torch's float32 norm of a
# vector is too small by 1e-5 at this size and by 4e-3 at 5e7 elements.
_NORM_NUMEL = 2**20


def local_sq_norms(shards: Iterable[Shard], arms: Sequence[int], *, rank: int, device: torch.device) -> Tensor:
    """Squared gradient norm of each arm over the elements this rank speaks for; summed over ranks they are global.

    Returns:
        One number per entry of `arms`, in that order. Shape (len(arms),), float64, local.
    """
    own = [shard for shard in shards if shard.piece.owner == rank and shard.gradient.numel() > 0]
    if not own:
        return torch.zeros(len(arms), dtype=torch.float64, device=device)
    parts = [(shard.piece.arm, part) for shard in own for part in torch.split(shard.gradient, _NORM_NUMEL)]
    norms = torch._foreach_norm([part for _, part in parts], 2, dtype=torch.float32)
    squares = torch.stack([norm.to(device) for norm in norms]).double().square()
    belongs = upload(arms, device)[:, None] == upload([arm for arm, _ in parts], device)
    return torch.where(belongs, squares, 0.0).sum(dim=1)


def upload(numbers: Sequence[float], device: torch.device) -> Tensor:
    """The numbers on a device. Shape (len(numbers),), float64.

    The host goes on at once; `torch.tensor` with a device waits until all work handed to the device is done.
    """
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
