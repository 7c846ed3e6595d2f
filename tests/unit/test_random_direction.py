"""A direction drawn at random."""

import pytest
import torch

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.directions.random import normals
from tests.models import tiny_decoder, window


def test_it_is_a_standard_normal_of_number_and_seed() -> None:
    numbers = torch.arange(200_000)
    z = normals(numbers, 3)
    ordered = z.double().sort().values
    normal = torch.distributions.Normal(0.0, 1.0).cdf(ordered)
    uniform = (torch.arange(len(z)) + 0.5) / len(z)
    assert (normal - uniform).abs().max() < 1.63 / len(z) ** 0.5  # Kolmogorov and Smirnov, at 1 %
    assert torch.equal(z[1000:2000], normals(numbers[1000:2000], 3))
    for other in (normals(numbers, 4), z.roll(1)):
        assert abs(torch.dot(z, other).item()) / len(z) < 4 / len(z) ** 0.5
    assert normals(torch.tensor([-1, 7, -1]), 3).tolist() == [0.0, z[7].item(), 0.0]


def test_each_step_draws_another_and_a_resumed_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def recorded(numbers: torch.Tensor, seed: int) -> torch.Tensor:
        drawn.append(seed)
        return normals(numbers, seed)

    monkeypatch.setattr("slsam_ds.directions.random.normals", recorded)

    def make() -> SLSAM:
        model = tiny_decoder()
        knobs = SLSAMConfig(ascent_source="random", selector="all")
        return SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3), knobs)

    first = make()
    for step in (1, 2):
        result = first.step(window(step, 0, 1))
        assert result.ascent_loss is None
        assert result.perturbation_norm == pytest.approx(0.05, rel=1e-4)
    assert len(set(drawn)) == 2
    seeds, second = drawn[len(drawn) // 2 :], make()
    second.step(window(1, 0, 1))
    state, third = second.state_dict(), make()
    third.load_state_dict(state)
    drawn.clear()
    third.step(window(2, 0, 1))
    assert drawn == seeds
