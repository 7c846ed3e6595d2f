"""The running mean of ascent gradients: that of the steps that were taken, and of numbers."""

from typing import Any

import torch
from torch import Tensor

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.directions.friendly import STATE_KEY
from tests.models import tiny_decoder, window


def make(**knobs: Any) -> SLSAM:
    model = tiny_decoder()
    config = SLSAMConfig(ascent_source="friendly", selector="all", **knobs)
    return SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config)


def means_of(slsam: SLSAM) -> list[Tensor]:
    return [state[STATE_KEY].clone() for state in slsam.engine.optimizer.state.values()]


def bad(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss * torch.nan
    return loss


def test_a_skipped_step_leaves_nothing_for_a_step_that_does_not_climb() -> None:
    slsam = make(ascend_when={"every": 2})
    for step in (1, 2):
        slsam.step(window(step, 0, 1))
    before = means_of(slsam)
    assert slsam.step(window(3, 0, 1), bad).skipped
    result = slsam.step(window(4, 0, 1))
    assert (result.rho, result.skipped) == (0.0, False)
    assert all(map(torch.equal, means_of(slsam), before))
    slsam.step(window(5, 0, 1))
    assert not any(map(torch.equal, means_of(slsam), before))


def test_an_ascent_without_labels_leaves_no_mean() -> None:
    """The step is taken, unperturbed: the ascent's half of the samples has no loss."""
    slsam = make(ascent_fraction=0.5)
    slsam.step(window(1, 0, 1))
    before = means_of(slsam)
    (batch,) = window(2, 0, 1)
    labels = batch["labels"].clone()
    labels[0] = -100
    result = slsam.step([{**batch, "labels": labels}])
    assert (result.skipped, result.ascent_loss) == (False, None)
    assert all(map(torch.equal, means_of(slsam), before))
