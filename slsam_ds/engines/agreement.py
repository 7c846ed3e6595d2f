"""How ranks find out whether they hold the same: fingerprints small enough to travel with every step."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
