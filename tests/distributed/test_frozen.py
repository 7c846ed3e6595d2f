"""What is not sampled does not change by a bit: weights, master weights, optimizer moments, step counters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, Setup, Training, slow
from tests.models import SAMPLES, arms_of_llama
from tests.ranks import run_on_ranks

Snapshot = dict[int, list[Tensor]]


def snapshot(training: Training) -> Snapshot:
    """Copies of everything this rank keeps of each arm."""
    arms = arms_of_llama(training.model)
    parameters = dict(training.model.named_parameters())
    live = {name: getattr(parameter, "ds_tensor", parameter) for name, parameter in parameters.items()}
    kept: Snapshot = {arm: [live[name].detach().clone() for name in names] for arm, names in enumerate(arms)}
    for arm, parameter, state in optimizer_entries(training):
        kept[arm].append(parameter.detach().clone())
        kept[arm] += [torch.as_tensor(state[name]).clone() for name in sorted(state)]
    return kept


def optimizer_entries(training: Training) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Arm, parameter and state of all that the torch optimizer steps: with ZeRO, this rank's master partitions."""
    optimizer = training.optimizer if training.engine is None else training.engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if training.setup.engine.startswith("zero3"):  # whose optimizer holds a sub-group only while it steps it
        for arm, groups in training.slsam.engine._groups_of.items():
            for master in (optimizer.fp32_partitioned_groups_flat[group] for group in groups):
                yield arm, master, inner.state.get(master, {})
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            yield group["arm"], parameter, inner.state.get(parameter, {})


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def changes(setup: Setup) -> list[dict[int, bool]]:
    """For each step, which arms are still the same."""
    training = Training(setup)
    before, seen = snapshot(training), []
    for step, sample in enumerate(SAMPLES, start=1):
        training.step(training.window(step), active=sample)
        after = snapshot(training)
        seen.append({arm: same_bits(before[arm], after[arm]) for arm in before})
        before = after
    return seen


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("engine", ["local", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED])
def test_frozen_means_frozen(engine: str, dtype: torch.dtype) -> None:
    setup = Setup(engine=engine, dtype=dtype, clip=1.0, accumulation=2)
    per_rank = run_on_ranks(2, changes, setup)
    for seen in per_rank:
        for sample, unchanged in zip(SAMPLES, seen, strict=True):
            assert unchanged == {arm: arm not in sample for arm in range(6)}


def optimizer_state_numel(setup: Setup) -> list[int]:
    training = Training(setup)
    sizes = []
    for step, sample in enumerate([[1], [1], [2]], start=1):
        training.step(training.window(step), active=sample)
        moments: list[Any] = [state.get("exp_avg") for _, _, state in optimizer_entries(training)]
        sizes.append(sum(moment.numel() for moment in moments if moment is not None))
    return sizes


@pytest.mark.parametrize(
    "engine", [slow("local"), slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", "zero3", *ALSO_OFFLOADED]
)
def test_optimizer_state_grows_with_the_layers_selected(engine: str) -> None:
    first, again, other = run_on_ranks(1, optimizer_state_numel, Setup(engine=engine))[0]
    assert first == again
    assert other == 2 * first
