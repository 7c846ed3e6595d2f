"""Prices of steps: one definition, of what was counted and of what is reckoned from numbers of weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import Layer, LayerMap
from slsam_ds.pricing.cost import CostModel, Workload
from slsam_ds.protocol import ALWAYS

TWO_PASSES, SINGLE = Workload(ascent=1.0, reused=0.0), Workload(ascent=0.0, reused=0.0)
REUSING = Workload(ascent=1.0, reused=1.0)


def by_weights() -> CostModel:
    """Of four layers of 10, 20, 30 and 40 weights."""
    return CostModel.by_weights(layer_map([10, 20, 30, 40]))


def layer_map(numels: Sequence[int], passed: Sequence[int] = ()) -> LayerMap:
    """Of layers of so many weights, one at each depth."""
    sizes = [nn.Parameter(torch.zeros(numel)) for numel in numels]
    layers = [Layer(index, str(index), ((str(index), one),), depth=index) for index, one in enumerate(sizes)]
    return LayerMap(tuple(layers), always=(), frozen=(), passed=tuple(passed))


@pytest.mark.parametrize(
    ("ascended", "updated", "workload", "price"),
    [
        (range(4), range(4), TWO_PASSES, 2.0),  # dense SAM
        ((), range(4), TWO_PASSES, 1.0),  # the base optimizer
        ([3], [3], TWO_PASSES, 2 * (100 + 40 + 40) / 300),
        ([3], [3], REUSING, (180 + 40 + 40 + 40) / 300),
        ([1], [1], TWO_PASSES, 2 * (100 + 90 + 20) / 300),
        ([1], [1], REUSING, 2 * (100 + 90 + 20) / 300),  # one block below: not worth it
        ((), [1], SINGLE, (100 + 90 + 20) / 300),
        ([3], range(4), REUSING, (100 + 40 + 40 + 300) / 300),  # nothing is below both passes
        (range(4), [3], TWO_PASSES, (300 + 100 + 40 + 40) / 300),
        ([2], [3], REUSING, (100 + 70 + 30 + 70 + 40 + 40) / 300),
        ([ALWAYS, 3], [ALWAYS, 3], TWO_PASSES, 2 * (100 + 40 + 40) / 300),
        ([3], [3], Workload(ascent=0.25, reused=0.0), 1.25 * (100 + 40 + 40) / 300),
    ],
)
def test_price_of_a_step(ascended: Any, updated: Any, workload: Workload, price: float) -> None:
    assert by_weights().price(ascended, updated, workload) == pytest.approx(price)


def test_frozen_weights_are_passed_through() -> None:
    costs = CostModel.by_weights(layer_map([1, 1, 1, 1], passed=[50, 10, 20, 30, 40, 100]))
    forward, adamw = 4 + 250, 254 + 204 + 4
    assert costs.price((), range(4), SINGLE) == pytest.approx(1.0)
    assert costs.price([3], [3], TWO_PASSES) == pytest.approx(2 * (forward + 141 + 1) / adamw)
    assert costs.price([2], [2], REUSING) == pytest.approx((2 * (forward + 172 + 1) - 82) / adamw)


@pytest.mark.parametrize("passed", [(), (5, 10, 10, 10, 10, 5)])
def test_samples_cost_what_their_steps_do(passed: tuple[int, ...]) -> None:
    costs = CostModel.by_weights(layer_map([10, 20, 30, 40], passed))
    for workload in (TWO_PASSES, SINGLE, REUSING, REUSING.thinned(0.25)):
        prices = costs.prices(workload)
        for sample in ([0], [3], [1, 3], [2, 3], range(4)):
            assert prices.of(list(sample)) == pytest.approx(costs.price(sample, sample, workload))


@pytest.mark.parametrize(
    ("knobs", "ascent"),
    [
        ({}, 1.0),
        ({"ascent_fraction": 0.25}, 0.25),
        ({"rho": 0.0}, 0.0),
        ({"ascent_source": "previous"}, 0.0),
        ({"ascent_source": "momentum"}, 0.0),
    ],
)
def test_only_an_ascent_pass_is_paid_for(knobs: dict[str, Any], ascent: float) -> None:
    assert Workload.of(SLSAMConfig(**knobs), 4, reuses_prefix=False).ascent == ascent
