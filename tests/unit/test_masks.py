"""Masks: exactly so many elements, packed in bits, and never those of a step that was not taken."""

import functools
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slsam_ds import SLSAM, SLSAMConfig, StepResult
from slsam_ds.masks import MASK_KEY
from slsam_ds.masks.bits import pack, unpack
from slsam_ds.masks.selection import Largest, Part, histogram
from slsam_ds.rng import random_bits, seed_of
from tests.models import tiny_decoder, window
from tests.reference import bits_of, key_of, largest

CPU: Any = SimpleNamespace(device=torch.device("cpu"), ranks=SimpleNamespace(all_reduce=lambda values: values))


def parts_of(keys: Tensor, sizes: Iterable[int], order: Tensor) -> Iterator[Part]:
    """The elements in another order, in pieces."""
    for number, numbers in enumerate(order.split(list(sizes))):
        of_replica = number % 3 == 2  # counted on the rank that speaks for it: here, once more
        for counted in (True, False) if of_replica else (True,):
            yield Part(0, keys[numbers.clamp(min=0)], numbers, lambda: torch.empty(0), counted=counted)


@pytest.mark.parametrize("count", [0, 1, 7, 500, 999, 1000, 2000])
@pytest.mark.parametrize("num_values", [2, 40, 2**31])
def test_as_many_as_wanted_are_selected(num_values: int, count: int) -> None:
    """The largest, of equal ones the first, as a stable sort has them; whatever the order that they come in."""
    generator = torch.Generator().manual_seed(num_values)
    keys = torch.randint(0, num_values, (1000,), generator=generator)
    order = torch.randperm(1000, generator=generator)
    padded = torch.cat([order[:400], torch.full((50,), -1), order[400:]])  # padding is nobody's
    parts = functools.partial(parts_of, keys, [300, 0, 150, 600], padded)
    selected = Largest(CPU, parts, lambda part: part.gradient, torch.tensor(count), numel=1000)
    found = torch.zeros(1000, dtype=torch.bool)
    for part in parts():
        chosen = selected(part)
        assert not chosen[part.numbers < 0].any()
        found[part.numbers[chosen]] = True
    assert torch.equal(found, largest(keys, count))
    assert selected.num == found.sum() == min(count, 1000)
    top = keys.topk(min(count, 1000)).values
    assert torch.equal(keys[found].sort(descending=True).values, top)


@pytest.mark.parametrize("lanes", [1, 7, 1024])
def test_a_histogram_is_the_same_in_any_number_of_lanes(lanes: int) -> None:
    values = torch.randint(0, 257, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(histogram(values, 256, lanes=lanes), torch.bincount(values, minlength=257)[:256])


def test_what_may_not_be_chosen_is_not() -> None:
    keys = torch.tensor([5, -1, 3, -1, 3, 0])
    parts = functools.partial(parts_of, keys, [6], torch.arange(6))
    for count, expected in ((2, [0, 2]), (4, [0, 2, 4, 5]), (6, [0, 2, 4, 5])):
        selected = Largest(CPU, parts, lambda part: part.gradient, torch.tensor(count), numel=300)
        (part,) = parts()
        assert selected(part).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000])
def test_bits_are_packed_and_unpacked(numel: int) -> None:
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = pack(bits)
    assert packed.numel() == -(-numel // 8)
    assert torch.equal(unpack(packed)[:numel], bits)


def test_random_bits_are_those_of_the_number() -> None:
    numbers = torch.arange(10_000)
    key = 2**62 + 12345
    found = random_bits(numbers, key)
    assert torch.equal(found[5000:], random_bits(numbers[5000:], key))
    assert found.min() >= 0
    assert found.max() < 2**30
    assert (found < 2**29).float().mean() == pytest.approx(0.5, abs=0.02)
    assert len(found.unique()) > 9_990
    assert torch.equal(bits_of(numbers, key_of(0, 3)), random_bits(numbers, seed_of(0, 3)))


def trained(**knobs: Any) -> tuple[SLSAM, torch.optim.Optimizer]:
    model = tiny_decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = SLSAMConfig(selector="all", mask_every=2, **knobs)
    return SLSAM(model, optimizer, config, total_steps=8), optimizer


def masks_of(slsam: SLSAM, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As a checkpoint would have them."""
    slsam.unpack_masks()
    return [state[MASK_KEY].clone() for state in optimizer.state.values() if MASK_KEY in state]


def nan(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss * torch.nan
    return loss


@pytest.mark.parametrize("mask", ["fisher", "dynamic"])
def test_a_skipped_step_leaves_the_mask_alone(mask: str) -> None:
    """Step 3 would refresh it; step 4 does so in its place."""
    slsam, optimizer = trained(mask=mask)
    for step in (1, 2):
        slsam.step(window(step, 0, 1))
    before = masks_of(slsam, optimizer)
    assert slsam.step(window(3, 0, 1), nan).skipped
    assert all(map(torch.equal, masks_of(slsam, optimizer), before))
    assert set(slsam.state_dict()["masks"].values()) == {1}
    assert not slsam.step(window(4, 0, 1)).skipped
    assert not all(map(torch.equal, masks_of(slsam, optimizer), before))
    assert set(slsam.state_dict()["masks"].values()) == {4}


def test_a_part_of_the_window_without_a_label_leaves_the_mask_alone() -> None:
    """The step is taken, unperturbed, and its ascent gradient is no number."""
    slsam, optimizer = trained(mask="fisher", ascent_fraction=0.5)
    slsam.step(window(1, 0, 1))
    slsam.step(window(2, 0, 1))
    before = masks_of(slsam, optimizer)
    (batch,) = window(3, 0, 1)
    labels = batch["labels"].clone()
    labels[0] = -100
    assert not slsam.step([{**batch, "labels": labels}]).skipped
    assert all(map(torch.equal, masks_of(slsam, optimizer), before))


def test_after_a_checkpoint_the_optimizers_state_is_its_own_again() -> None:
    slsam, optimizer = trained(mask="fisher")
    slsam.step(window(1, 0, 1))
    assert not any(MASK_KEY in state for state in optimizer.state.values())
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape
    masks = masks_of(slsam, optimizer)
    assert sum(mask.sum() for mask in masks) == round(0.5 * sum(mask.numel() for mask in masks))
    slsam.step(window(2, 0, 1))
    assert not any(MASK_KEY in state for state in optimizer.state.values())
    assert all(map(torch.equal, masks_of(slsam, optimizer), masks))


def test_masks_that_were_not_loaded_begin_anew(caplog: pytest.LogCaptureFixture) -> None:
    slsam, _ = trained(mask="fisher")
    slsam.step(window(1, 0, 1))
    other, _ = trained(mask="fisher")
    other.load_state_dict(slsam.state_dict())
    result: StepResult = other.step(window(2, 0, 1))
    assert "the masks of 6 layers were not loaded with the optimizer's state" in caplog.text
    assert result.mask_density == 1.0


def test_records_tell_the_density_only_with_a_mask() -> None:
    slsam, _ = trained(mask="fisher", mask_density=0.25)
    first, second = (slsam.step(window(step, 0, 1)).to_record() for step in (1, 2))
    assert first["mask_density"] == 1.0
    assert second["mask_density"] == pytest.approx(0.25, abs=1e-3)
    plain, _ = trained()
    assert "mask_density" not in plain.step(window(1, 0, 1)).to_record()


def test_a_dynamic_mask_needs_the_length_of_the_run() -> None:
    model = tiny_decoder()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r'^slsam\.mask="dynamic" with total_steps=None: give the number of steps'):
        SLSAM(model, optimizer, SLSAMConfig(mask="dynamic"))
