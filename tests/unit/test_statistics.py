"""Norms, rewards and the words for a disagreement."""

import torch

from slsam_ds.engines.agreement import describe_disagreement, fingerprint
from slsam_ds.protocol import Piece, Shard
from slsam_ds.rewards import RewardScale
from slsam_ds.tally import local_sq_norms


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


def test_rewards_are_shares_of_a_maximum_that_decays() -> None:
    scale = RewardScale("grad_norm", [10, 10])
    assert scale.rewards({0: 2.0, 1: 8.0}) == {0: 0.25, 1: 1.0}
    later = scale.rewards({0: 2.0})[0]
    assert 0.25 < later < 0.26  # against a maximum a little below 8
    for _ in range(1000):
        last = scale.rewards({0: 2.0})[0]
    assert last == 1.0  # the large norm of long ago is forgotten


def test_rms_rewards_divide_by_the_number_of_weights() -> None:
    scale = RewardScale("grad_rms", [100, 400])
    assert scale.rewards({0: 1.0, 1: 1.0}) == {0: 1.0, 1: 0.5}


def test_no_gradient_at_all_gives_no_reward_and_no_nan() -> None:
    assert RewardScale("grad_norm", [10, 10]).rewards({0: 0.0, 1: 0.0}) == {0: 0.0, 1: 0.0}


def test_fingerprints_tell_values_apart_and_fit_int64_twice() -> None:
    prints = {fingerprint(value) for value in ([1, 2], [2, 1], "1", 1, {"a": 1.0}, {"a": 1.0000001})}
    assert len(prints) == 6
    assert all(-value >= -(2**63) and value < 2**63 for value in prints)
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": (1, 2)})


def test_a_disagreement_names_what_differs_and_who_holds_what() -> None:
    claims = [
        {"the step": 4, "the sample": (1, 2)},
        {"the step": 4, "the sample": (1, 3)},
        {"the step": 4, "the sample": (1, 2)},
    ]
    assert describe_disagreement(claims) == "the sample (ranks 0, 2: (1, 2); rank 1: (1, 3))"
