"""The numbers of a step: layer norms, the rewards made of them, and fingerprints by which ranks compare notes."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slsam_ds.config import Reward
from slsam_ds.protocol import Shard

# Squared norms are taken of so many elements at once and added up in float64: on the CPU, torch's float32 norm of a
# vector is too small by 1e-5 at this size and by 4e-3 at 5e7 elements.
_NORM_NUMEL = 2**20

# How long the bandit remembers the largest norm: it forgets half in about 70 steps.
_MAXIMUM_DECAY = 0.99


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


_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RewardScale:
    """Turns gradient norms into rewards in [0, 1] by a decayed running maximum.

    Args:
        kind: "grad_norm"; "grad_rms" (norm divided by the square root of the layer's element count), or
            "grad_norm_per_cost" (divided by what a step on the layer alone costs).
        numels: Element count of each arm, global.

    Attributes:
        costs: Of each arm, for rewards per cost; set before the first of them.
    """

    def __init__(self, kind: Reward, numels: Sequence[int]) -> None:
        self.kind = kind
        self.numels = tuple(numels)
        self.maximum = 0.0
        self.costs: Sequence[float] = ()

    def rewards(self, norms: Mapping[int, float]) -> dict[int, float]:
        """Reward of each arm seen this step; moves the running maximum. All-zero norms give all-zero rewards."""
        values = {arm: self._value(arm, norm) for arm, norm in norms.items()}
        self.maximum = max([_MAXIMUM_DECAY * self.maximum, *values.values()])
        return {arm: value / self.maximum if self.maximum > 0 else 0.0 for arm, value in values.items()}

    def _value(self, arm: int, norm: float) -> float:
        match self.kind:
            case "grad_norm":
                return norm
            case "grad_rms":
                return norm / math.sqrt(self.numels[arm])
            case "grad_norm_per_cost":
                return norm / self.costs[arm]


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that differs where a single bit does: the sum of the bits, read as whole numbers, modulo 2^64."""
    sums = [tensor.detach().view(_INTEGER_OF_SIZE[tensor.element_size()]).sum() for tensor in tensors]
    return sum(torch.stack(sums).tolist()) % 2**64 if sums else 0


def fingerprint(value: Any) -> int:
    """A 62-bit digest of the value's `repr`: small enough for int64 arithmetic, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 2


def describe_disagreement(per_rank: Sequence[Mapping[str, Any]]) -> str:
    """One line naming what differs between ranks and who holds which value.

    Args:
        per_rank: What each rank claimed, by name, in rank order.
    """
    differences = []
    for name in per_rank[0]:
        holders: dict[str, list[int]] = {}
        for rank, claims in enumerate(per_rank):
            holders.setdefault(repr(claims.get(name)), []).append(rank)
        if len(holders) > 1:
            views = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in holders.items())
            differences.append(f"{name} ({views})")
    return ", ".join(differences)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
