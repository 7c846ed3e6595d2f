"""Remembered gradients find their weights again, in the optimizer's state."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds.directions.previous import STATE_KEY, PreviousGradients
from slsam_ds.gradient import Gradient
from slsam_ds.protocol import Piece, Shard


def piece(arm: int, stepped: Tensor, offset: int, numel: int) -> Piece:
    weight = stepped[offset : offset + numel]
    return Piece(arm, weight, weight, stepped, 0, offset)


def previous_gradients(state: dict[Tensor, dict[str, Any]], home: torch.device | None = None) -> PreviousGradients:
    engine: Any = SimpleNamespace(
        optimizer=SimpleNamespace(state=state), optimizer_state_home=home, device=torch.device("cpu")
    )
    return PreviousGradients(engine)


def observe(previous: PreviousGradients, shards: list[Shard], sq_norms: dict[int, float], *, loss_scale: float) -> None:
    gradient = Gradient(tuple(sq_norms), shards, torch.tensor([*sq_norms.values()]), loss_scale)
    previous.observe(gradient, sq_norms)


def recall(previous: PreviousGradients, pieces: list[Piece]) -> list[Shard]:
    vars(previous._engine)["pieces"] = lambda arms: [piece for piece in pieces if piece.arm in arms]
    gradient = previous.climb(tuple({piece.arm for piece in pieces}), None, seed=0)
    assert gradient is not None
    assert gradient.sq_norms.tolist() == [previous.sq_norms[arm] for arm in gradient.arms]
    return gradient.shards


def test_pieces_may_be_cut_otherwise_and_padded() -> None:
    stepped, state = torch.zeros(8), {}
    state[stepped] = {}
    previous = previous_gradients(state)
    shards = [
        Shard(piece(2, stepped, 0, 3), torch.tensor([2.0, 4.0, 6.0])),
        Shard(piece(2, stepped, 4, 2), torch.tensor([8.0, 10.0])),
    ]
    observe(previous, shards, {2: 55.0}, loss_scale=2.0)
    assert previous.arms == ()
    previous.keep(ascent_is_finite=True)
    recalled = recall(previous, [piece(2, stepped, 0, 1), piece(2, stepped, 1, 7)])
    assert previous.sq_norms == {2: 55.0}
    assert [shard.gradient.tolist() for shard in recalled] == [[1.0], [2.0, 3.0, 0.0, 4.0, 5.0, 0.0, 0.0]]
    assert previous.arms == (2,)


def test_it_is_kept_in_bf16_and_owns_its_memory() -> None:
    stepped, state = torch.zeros(4), {}
    state[stepped] = {}
    previous = previous_gradients(state, home=torch.device("cpu"))
    gradient = torch.ones(4, dtype=torch.bfloat16)
    observe(previous, [Shard(piece(0, stepped, 0, 4), gradient)], {0: 4.0}, loss_scale=1.0)
    previous.keep(ascent_is_finite=True)
    gradient.zero_()
    state[stepped][STATE_KEY] = state[stepped][STATE_KEY].float()  # as optimizers load it
    (shard,) = recall(previous, [piece(0, stepped, 0, 4)])
    assert shard.gradient.dtype == torch.bfloat16
    assert shard.gradient.tolist() == [1.0] * 4


def test_an_arm_that_is_empty_on_this_rank() -> None:
    stepped, state = torch.zeros(0), {}
    state[stepped] = {}
    previous = previous_gradients(state)
    observe(previous, [Shard(piece(1, stepped, 0, 0), torch.zeros(0))], {1: 9.0}, loss_scale=1.0)
    previous.keep(ascent_is_finite=True)
    (shard,) = recall(previous, [piece(1, stepped, 0, 0)])
    assert shard.gradient.numel() == 0
    assert previous.sq_norms == {1: 9.0}


def test_what_did_not_come_along_is_forgotten_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    here, lost = torch.zeros(2), torch.zeros(2)
    state: dict[Tensor, dict[str, Any]] = {here: {STATE_KEY: torch.zeros(2)}}
    previous = previous_gradients(state)
    previous.sq_norms = {0: 1.0, 3: 2.0}
    previous.forget_lost([piece(0, here, 0, 2), piece(3, lost, 0, 2), piece(4, lost, 0, 2)])
    assert previous.arms == (0,)
    (record,) = caplog.records
    assert "of 1 layers" in record.getMessage()
