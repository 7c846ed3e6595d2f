"""A run that stopped goes on as if it had not: to the last bit with as many ranks, within rounding with others.

Between the halves nothing but the files is left: the resumed run begins with other weights, and, where ranks are to
agree with other numbers of ranks, every rank sees the same data.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from slsam_ds.directions import DIRECTIONS
from slsam_ds.engines.deepspeed.config import check_config
from slsam_ds.state.files import STATE_FILE
from tests.distributed.training import (
    ALSO_OFFLOADED,
    ALSO_ZERO0,
    ALSO_ZERO1,
    ALSO_ZERO3,
    LlamaSetup,
    Setup,
    Training,
    max_error,
    slow,
)
from tests.models import window
from tests.ranks import run_on_ranks

ENGINES = [slow("local"), ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", "fsdp2", *ALSO_OFFLOADED]
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
    setup: Setup, folder: str, samples: Sequence[Any], resumed: bool, own_data: bool = False
) -> tuple[dict[str, Tensor], list[tuple[int, ...]], dict[str, Any]]:
    """The whole run, which saves half way; or its second half, from there. On every rank the same data, or its own."""
    training = Training(setup, total_steps=len(samples))
    if resumed:
        load(training, folder)
    active = []
    for step, sample in enumerate(samples, start=1):
        if resumed and step <= HALF:
            continue
        batches = window(step, training.rank if own_data else 0, setup.accumulation)
        forced = sample if isinstance(sample, dict) else {"active": sample}
        active.append(training.step(batches, **forced).active)
        if step == HALF and not resumed:
            save(training, folder)
    return training.weights(), active, training.slsam.state_dict()


def resumed_by(
    num_ranks: int, setup: Setup, folder: Path, samples: Sequence[Any] = SAMPLES, *, own_data: bool = False
) -> tuple[float, Any, Any]:
    """Largest difference of the weights, and what the whole and the resumed run did from half way on."""
    whole = run_on_ranks(2, train, setup, str(folder), samples, False, own_data)[0]
    other = replace(setup, model={**setup.model, **OTHER_WEIGHTS})
    second = run_on_ranks(num_ranks, train, other, str(folder), samples, True, own_data)[0]
    return max_error(second[0], whole[0]), (whole[1][HALF:], whole[2]), second[1:]


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bit_identical(engine: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each rank has data and dropout masks of its own, and the bandit chooses."""
    setup = LlamaSetup(engine=engine, dtype=dtype, slsam={"active_layers": 2, "rho": 0.02}, model={"dropout": 0.2})
    error, whole, resumed = resumed_by(2, setup, tmp_path, [None] * 8, own_data=True)
    assert error == 0.0
    assert resumed == whole
    json.dumps(resumed[1])


@pytest.mark.parametrize("num_ranks", [slow(1), 3])
@pytest.mark.parametrize("engine", [slow(engine) if engine in ("zero2", "zero3") else engine for engine in ENGINES])
def test_resume_by_another_number_of_ranks(engine: str, num_ranks: int, tmp_path: Path) -> None:
    """Layers never selected before have no optimizer state, parameters outside the optimizer are in no partition of it,
    and three ranks cut all of them unevenly.
    """
    error, whole, resumed = resumed_by(num_ranks, Setup(engine=engine, slsam=FROZEN), tmp_path)
    assert error <= TOLERANCE
    assert resumed[1]["updates"] == whole[1]["updates"] == [4, 2, 4, 2]


@pytest.mark.slow
def test_the_bandit_goes_on_by_another_number_of_ranks(tmp_path: Path) -> None:
    _, whole, resumed = resumed_by(3, Setup(engine="zero2", slsam={"active_layers": 2}), tmp_path, [None] * 8)
    assert resumed[0] == whole[0]


@pytest.mark.parametrize("num_ranks", [slow(1), slow(2), 3])
@pytest.mark.parametrize("engine", [slow("local"), ALSO_ZERO0, "zero2", ALSO_ZERO3, slow("fsdp2"), *ALSO_OFFLOADED])
@pytest.mark.parametrize("direction", [name for name, direction in DIRECTIONS.items() if direction.kept])
def test_resume_takes_along_what_a_direction_keeps(direction: str, engine: str, num_ranks: int, tmp_path: Path) -> None:
    setup = Setup(engine=engine, slsam={"ascent_source": direction})
    error, _, _ = resumed_by(num_ranks, setup, tmp_path)
    assert error <= (0.0 if num_ranks == 2 else TOLERANCE)


@pytest.mark.parametrize("num_ranks", [slow(1), slow(2), 3])
@pytest.mark.parametrize("engine", [slow("local"), ALSO_ZERO0, "zero2", slow("zero3"), slow("fsdp2"), *ALSO_OFFLOADED])
@pytest.mark.parametrize("mask", [slow("fisher"), "dynamic"])
def test_resume_takes_masks_along(mask: str, engine: str, num_ranks: int, tmp_path: Path) -> None:
    """Also those of layers that were never updated, which have no other state: all are perturbed, in every step."""
    setup = Setup(engine=engine, slsam={"mask": mask, "mask_every": 3, "offload_state": mask == "dynamic"})
    choices = [{"perturbed": range(6), "updated": sample} for sample in SAMPLES]
    error, whole, resumed = resumed_by(num_ranks, setup, tmp_path, choices)
    assert error <= (0.0 if num_ranks == 2 else TOLERANCE)
    assert resumed[1]["masks"] == whole[1]["masks"] == dict.fromkeys("012345", 7)


def through_stock_checkpoint(setup: Setup, folder: str) -> float:
    """Save and load as torch documents it, with the one way that it offers where state is missing."""
    options = StateDictOptions(strict=False)
    trained, fresh = Training(setup), Training(replace(setup, model=OTHER_WEIGHTS))
    for step, sample in enumerate(SAMPLES[:HALF], start=1):
        trained.step(window(step, 0, 1), active=sample)

    def content(training: Training) -> dict[str, Any]:
        model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    dcp.save(content(trained), checkpoint_id=folder)
    loaded = content(fresh)
    dcp.load(loaded, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(
        fresh.model,
        fresh.optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options,
    )
    fresh.slsam.load_state_dict(trained.slsam.state_dict())
    for training in (trained, fresh):
        for step, sample in enumerate(SAMPLES[HALF:], start=HALF + 1):
            training.step(window(step, 0, 1), active=sample)
    return max_error(trained.weights(), fresh.weights())


def test_a_step_that_torch_makes_up_is_not_counted(tmp_path: Path) -> None:
    """`allow_partial_load` leaves layers without saved state with a step that was never taken."""
    assert run_on_ranks(2, through_stock_checkpoint, Setup(engine="fsdp2"), str(tmp_path))[0] == 0.0


def save_a_step(setup: Setup, folder: str) -> None:
    training = Training(setup)
    training.step(window(1, training.rank, 1), active=[0, 1])
    save(training, folder)


def refuse(setups: Sequence[Setup], folder: str) -> list[str]:
    """What loading says to each; nothing was loaded, and a step is taken all the same."""
    sentences = []
    for setup in setups:
        training = Training(setup)
        before = training.weights()
        with pytest.raises(ValueError, match=r".") as refused:
            load(training, folder)
        assert max_error(training.weights(), before) == 0.0
        assert not training.step(window(1, training.rank, 1), active=[0]).skipped
        sentences.append(str(refused.value))
    return sentences


@pytest.mark.parametrize("engine", [ALSO_ZERO0, slow("zero2"), ALSO_ZERO3, "fsdp2"])
def test_what_does_not_fit_is_refused_and_changes_nothing(engine: str, tmp_path: Path) -> None:
    setup = Setup(engine=engine)
    run_on_ranks(2, save_a_step, setup, str(tmp_path))
    misfits = {
        "it has 6 layers, this run 7": replace(setup, model={"num_blocks": 5}),
        "layer 0 is before model.layers with 2,048 weights, this run's is before model.layers with 4,096": replace(
            setup, model={"hidden": 64}
        ),
        "active_layers=0.2 (this run: 3)": replace(setup, slsam={"active_layers": 3}),
    }
    if engine == "zero2":
        misfits["was saved with zero_optimization.stage=2, this run has 3"] = replace(setup, engine="zero3")
    for ranks_sentences in run_on_ranks(2, refuse, list(misfits.values()), str(tmp_path)):
        for sentence, expected in zip(ranks_sentences, misfits, strict=True):
            assert expected in sentence
    folder = next(tmp_path.rglob(STATE_FILE)).parent
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    if engine != "fsdp2":  # torch.distributed.checkpoint has no checksums
        half = len(content) // 2
        largest.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
        (damaged,) = run_on_ranks(2, refuse, [setup], str(tmp_path))[0]
        assert f"{largest.name} is damaged: resume from another checkpoint" in damaged
    largest.write_bytes(content[: len(content) // 2])
    (torn,) = run_on_ranks(2, refuse, [setup], str(tmp_path))[1]
    assert f"{largest.name} has {len(content) // 2:,} of {len(content):,} bytes: resume from another" in torn


@pytest.mark.slow
def test_partitions_in_another_order_are_put_in_order(tmp_path: Path) -> None:
    """Which depends on the number of ranks."""
    deepspeed = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    error, _, _ = resumed_by(3, Setup(engine="zero2", deepspeed=deepspeed), tmp_path)
    assert error <= TOLERANCE


def test_the_universal_checkpoint_is_refused_in_favour_of_ours() -> None:
    with pytest.raises(ValueError, match="slsam_ds loads plain checkpoints of any number of ranks"):
        check_config({"checkpoint": {"load_universal": True}})
