"""Remembered gradients find their weights again."""

import torch

from slsam_ds.previous import PreviousGradients
from slsam_ds.protocol import Piece, Shard


def piece(arm: int, numel: int) -> Piece:
    weight = torch.zeros(numel)
    return Piece(arm, weight, weight, 0)


def test_pieces_may_be_cut_otherwise_and_padded() -> None:
    previous = PreviousGradients()
    shards = [Shard(piece(2, 3), torch.tensor([2.0, 4.0, 6.0])), Shard(piece(2, 2), torch.tensor([8.0, 10.0]))]
    previous.remember(shards, {2: 55.0}, loss_scale=2.0)
    recalled, sq_norms = previous.recall([piece(2, 1), piece(2, 7), piece(5, 4)])
    assert sq_norms == {2: 55.0}
    assert [shard.gradient.tolist() for shard in recalled] == [[1.0], [2.0, 3.0, 4.0, 5.0]]
    assert [shard.piece.weight.numel() for shard in recalled] == [1, 4]
    assert previous.arms == (2,)


def test_it_is_kept_at_home_in_bf16_and_owns_its_memory() -> None:
    previous = PreviousGradients(home=torch.device("cpu"))
    gradient = torch.ones(4, dtype=torch.bfloat16)
    previous.remember([Shard(piece(0, 4), gradient)], {0: 4.0}, loss_scale=1.0)
    gradient.zero_()
    (shard,), _ = previous.recall([piece(0, 4)])
    assert shard.gradient.dtype == torch.bfloat16
    assert shard.gradient.tolist() == [1.0] * 4


def test_an_arm_that_is_empty_on_this_rank() -> None:
    previous = PreviousGradients()
    previous.remember([Shard(piece(1, 0), torch.zeros(0))], {1: 9.0}, loss_scale=1.0)
    (shard,), sq_norms = previous.recall([piece(1, 0)])
    assert shard.gradient.numel() == 0
    assert sq_norms == {1: 9.0}
