"""Numbers of a step: added up by name, summed over ranks together, read once."""

import math

import torch
from torch import Tensor

from slsam_ds.protocol import Piece, Shard
from slsam_ds.tally import Tally, local_sq_norms


class TwoAlike:
    """As if another rank had added the same."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.num_calls = 0

    def all_reduce(self, values: Tensor) -> Tensor:
        self.num_calls += 1
        return values.mul_(2)


def test_numbers_travel_together_and_are_read_by_name() -> None:
    ranks = TwoAlike()
    tally = Tally(ranks, torch.device("cpu"))  # type: ignore[arg-type]
    tally.add("loss", torch.tensor(1.0))
    tally.add("loss", torch.tensor(0.5))
    assert tally.local_sum("loss", "ascent_loss").item() == 1.5
    tally.add("norms", torch.tensor([1.0, 0.0, math.inf], dtype=torch.bfloat16))
    tally.reduce()
    tally.add("late", torch.tensor(4))
    tally.reduce()
    assert ranks.num_calls == 2
    assert tally["norms"].dtype == torch.float64
    numbers = tally.read()
    assert (numbers["loss"], numbers["late"], numbers.get("missing")) == (3.0, 8.0, None)
    assert numbers.by_arm("norms", [2, 5, 7]) == {2: 2.0, 5: 0.0, 7: math.inf}
    assert numbers.raised("norms") == (0, 2)
    assert numbers.all_finite("loss", "missing")
    assert not numbers.all_finite("loss", "norms")
    assert "late" in numbers
    assert "missing" not in numbers


def shard(arm: int, gradient: torch.Tensor, owner: int = 0) -> Shard:
    return Shard(Piece(arm, gradient, gradient, gradient, owner), gradient)


def test_each_arm_sums_the_shards_this_rank_speaks_for() -> None:
    shards = [
        shard(1, torch.tensor([3.0, 4.0])),
        shard(1, torch.tensor([12.0])),
        shard(4, torch.tensor([2.0]), owner=1),  # a replica another rank speaks for
        shard(4, torch.tensor([])),
    ]
    sq_norms = local_sq_norms(shards, [1, 4], rank=0, device=torch.device("cpu"))
    assert sq_norms.tolist() == [169.0, 0.0]
    assert sq_norms.dtype == torch.float64


def test_bf16_gradients_are_summed_in_float32() -> None:
    gradient = torch.full((10_000,), 0.01, dtype=torch.bfloat16)
    sq_norm = local_sq_norms([shard(0, gradient)], [0], rank=0, device=torch.device("cpu")).item()
    assert abs(sq_norm - gradient.double().square().sum().item()) < 1e-5


def test_norms_of_large_shards_lose_no_digits() -> None:
    gradient = torch.randn(2**25, generator=torch.Generator().manual_seed(0))
    sq_norm = local_sq_norms([shard(0, gradient)], [0], rank=0, device=torch.device("cpu")).item()
    exact = sum(part.double().square().sum().item() for part in gradient.split(2**20))
    assert abs(sq_norm / exact - 1) < 1e-4
