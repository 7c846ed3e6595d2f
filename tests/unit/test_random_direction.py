"""A direction drawn at random."""

import pytest
import torch

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.directions.random import normal
from slsam_ds.protocol import Piece
from tests.models import tiny_decoder, window


def test_it_is_a_standard_normal_of_the_seed() -> None:
    weight = torch.zeros(100_000)
    piece = Piece(0, weight, weight, weight, owner=0)
    z = normal(piece, 3)
    assert abs(z.mean().item()) < 0.02
    assert z.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(z, normal(piece, 3))
    assert abs(torch.dot(z, normal(piece, 4)).item()) / weight.numel() < 0.02


def test_each_step_draws_another_and_a_resumed_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def recorded(piece: Piece, seed: int) -> torch.Tensor:
        drawn.append(seed)
        return normal(piece, seed)

    monkeypatch.setattr("slsam_ds.directions.random.normal", recorded)

    def make() -> SLSAM:
        model = tiny_decoder()
        knobs = SLSAMConfig(ascent_source="random", selector="all")
        return SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3), knobs)

    first = make()
    for step in (1, 2):
        result = first.step(window(step, 0, 1))
        assert result.ascent_loss is None
        assert result.perturbation_norm == pytest.approx(0.05, rel=1e-4)
    assert len(set(drawn)) == len(drawn)
    seeds, second = drawn[len(drawn) // 2 :], make()
    second.step(window(1, 0, 1))
    state, third = second.state_dict(), make()
    third.load_state_dict(state)
    drawn.clear()
    third.step(window(2, 0, 1))
    assert drawn == seeds
