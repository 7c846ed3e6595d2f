"""A run that stopped goes on as if it had not: to the last bit with as many ranks, within rounding with others.

Between the halves nothing but the files is left: the resumed run begins with other weights, and, where ranks are to
agree with other numbers of ranks, every rank sees the same data.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training, max_error, slow
from tests.models import window
from tests.ranks import run_on_ranks

ENGINES = ["local", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", "fsdp2", *ALSO_OFFLOADED]
TOLERANCE = 1e-6  # fp32: other numbers of ranks add up in another order

# Of the arms 0 to 3, which the frozen embedding, norm and head leave, 1 and 3 are first selected after the resume.
SAMPLES = [[0], [0, 2], [2], [0], [1], [0, 1, 2, 3], [3], [2]]
HALF = 4
FROZEN = {"other_parameters": "freeze"}
OTHER_WEIGHTS = {"seed": 1}


def save(training: Training, folder: str) -> None:
    (training.engine or training.slsam).save_checkpoint(folder)


def load(training: Training, folder: str) -> None:
    (training.engine or training.slsam).load_checkpoint(folder)


def train(
    setup: Setup, folder: str, samples: Sequence[Sequence[int] | None], resumed: bool, own_data: bool = False
) -> tuple[dict[str, Tensor], list[tuple[int, ...]], dict[str, Any]]:
    """The whole run, which saves half way; or its second half, from there. On every rank the same data, or its own."""
    training = Training(setup)
    if resumed:
        load(training, folder)
    active = []
    for step, sample in enumerate(samples, start=1):
        if resumed and step <= HALF:
            continue
        batches = window(step, training.rank if own_data else 0, setup.accumulation)
        active.append(training.step(batches, active=sample).active)
        if step == HALF and not resumed:
            save(training, folder)
    return training.weights(), active, training.slsam.state_dict()


def resumed_by(
    num_ranks: int, setup: Setup, folder: Path, samples: Sequence[Sequence[int] | None] = SAMPLES
) -> tuple[float, Any, Any]:
    """Largest difference of the weights, and what both runs did from half way on."""
    whole = run_on_ranks(2, train, setup, str(folder), samples, False)[0]
    other = Setup(**{**vars(setup), "model": {**setup.model, **OTHER_WEIGHTS}})
    second = run_on_ranks(num_ranks, train, other, str(folder), samples, True)[0]
    return max_error(second[0], whole[0]), (whole[1][HALF:], whole[2]), second[1:]


@pytest.mark.parametrize("num_ranks", [slow(1), 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_by_another_number_of_ranks(engine: str, num_ranks: int, tmp_path: Path) -> None:
    error, _, _ = resumed_by(num_ranks, Setup(engine=engine, slsam=FROZEN), tmp_path)
    assert error <= TOLERANCE


@pytest.mark.parametrize("num_ranks", [slow(1), slow(2), 3])
@pytest.mark.parametrize("engine", ["local", ALSO_ZERO0, slow("zero1"), "zero2", "zero3", "fsdp2", *ALSO_OFFLOADED])
def test_resume_takes_the_previous_gradients_along(engine: str, num_ranks: int, tmp_path: Path) -> None:
    setup = Setup(engine=engine, slsam={"ascent_source": "previous"})
    error, _, _ = resumed_by(num_ranks, setup, tmp_path)
    assert error <= (0.0 if num_ranks == 2 else TOLERANCE)
