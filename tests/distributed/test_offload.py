"""`offload_state` where state and master weights really move from device to device, though there is no accelerator.

A stand-in for `place` copies, ruins what was left behind, and notes which tensors are on the host: whoever reads a
tensor that has gone elsewhere reads NaN.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slsam_ds import SLSAMConfig
from slsam_ds.model import state_home
from slsam_ds.shards import local_elements
from tests.distributed.training import ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3, Setup, Training, slow
from tests.models import window
from tests.ranks import run_on_ranks

HOST = torch.device("cpu", 0)
"""Is not equal to the device of a tensor on the CPU, which stands for the accelerator."""

ENGINES = [slow("local"), "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3]
SAMPLES = [[0], [2, 3], [2], [5], [0, 4], [2], [1], [0, 1, 2, 3, 4, 5], [3, 4]]
HALF = 5
CASES: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "previous": {"ascent_source": "previous"},
    "momentum": {"ascent_source": "momentum"},
    "friendly": {"ascent_source": "friendly"},
    "preconditioned": {"metric": "preconditioned", "rho": 0.01},
    "masked": {"mask": "fisher", "mask_every": 2, "ascent_source": "previous"},
    "bf16": {},
    "bf16, from the masters": {"rounding": "nearest", "metric": "adaptive"},
}


class Places:
    """Which tensors are on the host; all others are on the accelerator."""

    def __init__(self) -> None:
        self._on_host: Any = WeakIdKeyDictionary()
        self.num_moves = 0

    @classmethod
    def on_duty(cls, patch: pytest.MonkeyPatch) -> Self:
        """In the place of `place`; state waits on this host."""
        places = cls()
        patch.setattr(state_home, "place", places.place)
        patch.setattr(SLSAMConfig, "state_home", property(lambda knobs: HOST if knobs.offload_state else None))
        return places

    def place(self, tensor: Tensor, device: torch.device) -> Tensor:
        if self.on_host(tensor) == (device == HOST):
            return tensor
        moved = tensor.clone()
        # The host's stay, to be written again; whoever reads one meanwhile is wrong.
        there = local_elements(tensor)
        there.fill_(torch.nan if there.is_floating_point() else 1)
        if device == HOST:
            self._on_host[moved] = True
        self.num_moves += 1
        return moved

    def on_host(self, tensor: Tensor) -> bool:
        return tensor in self._on_host

    def elsewhere(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of state that is on the accelerator."""
        return [
            name
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.dim() > 0 and not self.on_host(value)
        ]


def train(engine: str, folder: str) -> list[str]:
    """Every case, with state that stays, with state that moves, and stopped half way and resumed. What went wrong."""
    wrong = []
    for name, knobs in CASES.items():
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        staying = Setup(engine=engine, dtype=dtype, slsam=knobs)
        moving = replace(staying, slsam={**knobs, "offload_state": True})
        expected = follow(staying, SAMPLES)
        with pytest.MonkeyPatch.context() as patch:
            places = Places.on_duty(patch)
            if follow(moving, SAMPLES, places) != expected:
                wrong.append(f"{name}: other numbers")
            checkpoint = f"{folder}/{name}"
            follow(moving, SAMPLES[:HALF], places, save_to=checkpoint)
            if follow(moving, SAMPLES, places, load_from=checkpoint) != expected:
                wrong.append(f"{name}: other numbers after a resume")
        assert places.num_moves > 0
    return wrong


def follow(
    setup: Setup,
    samples: Sequence[Sequence[int]],
    places: Places | None = None,
    *,
    load_from: str = "",
    save_to: str = "",
) -> list[str]:
    """Digests of the weights in the end, and of the moments that DeepSpeed hands out after the later steps."""
    training = Training(setup)
    optimizer = training.slsam.engine.optimizer
    owner = training.engine or training.slsam
    if load_from:
        owner.load_checkpoint(load_from)
    fetched: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: fetched.append(fetched_bytes(training, places)) if places else None)
    digests = []
    for step, sample in enumerate(samples, start=1):
        if load_from and step <= HALF:
            continue
        assert places is None or places.elsewhere(optimizer) == []
        assert places is None or all(map(places.on_host, [*masks_of(training), *masters_of(training)]))
        fetched.clear()
        training.step(window(step, training.rank, 1), active=sample)
        if places is not None and step == len(SAMPLES):  # by now its layer has moments
            check_fetched(training, sample, max(fetched))
        if step > HALF and setup.engine in ("zero1", "zero2", "zero3"):
            digests += [digest(moments(training)), digest(masters(training))]
    if save_to:
        owner.save_checkpoint(save_to)
        assert places is None or places.elsewhere(optimizer) == []
        training.step(window(0, training.rank, 1), active=[1, 2])
    return [*digests, digest(training.weights())]


def masks_of(training: Training) -> list[Tensor]:
    """As they wait, beside the optimizer's state."""
    mask = training.slsam._mask
    return [] if mask is None else list(mask._bits._packed.values())


def masters_of(training: Training) -> list[Tensor]:
    """As they wait. Of 16-bit weights there are some wherever DeepSpeed is."""
    waiting = list(training.slsam.engine._masters._waiting.values())
    is_expected = training.setup.engine.startswith("zero") and training.setup.dtype == torch.bfloat16
    assert bool(waiting) >= is_expected
    return waiting


def masters(training: Training) -> dict[str, Tensor]:
    """All master weights that DeepSpeed hands out, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter) for name, parameter in training.model.named_parameters()}


def fetched_bytes(training: Training, places: Places) -> int:
    """Of moments and master weights that are where they are stepped."""
    engine = training.slsam.engine
    masters = [master for master, waiting in engine._masters._waiting.items() if not same_data(master, waiting)]
    state = [
        value
        for each in engine.optimizer.state.values()
        for name, value in each.items()
        if value.dim() > 0 and not name.startswith(state_home.OWN_PREFIX) and not places.on_host(value)
    ]
    return sum(local_elements(each).numel() * each.element_size() for each in [*masters, *state])


def check_fetched(training: Training, sample: Sequence[int], found: int) -> None:
    """It is what `estimate` says a step brings to the device: one layer's moments, and all masters if there are any."""
    numels = [training.slsam.layers[arm].numel for arm in sample]
    masters, moments = (4 * sum(numels), 8) if masters_of(training) else (0, 2 * training.setup.dtype.itemsize)
    part = 1 if training.setup.engine in ("local", "zero0") else torch.distributed.get_world_size()
    expected = (masters + moments * max(numels)) / part
    assert found == pytest.approx(expected, rel=0.05), f"{found} bytes, not {expected}"  # partitions are padded


def same_data(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


def moments(training: Training) -> dict[str, Tensor]:
    """The first moments of all that was ever updated, whole."""
    from deepspeed.utils import safe_get_full_optimizer_state

    updated = [arm for arm, count in enumerate(training.slsam.progress.updates) if count]
    names = [name for arm in updated for name, _ in training.slsam.layers[arm].parameters]
    parameters = dict(training.model.named_parameters())
    return {name: safe_get_full_optimizer_state(parameters[name], "exp_avg") for name in names}


def digest(tensors: Mapping[str, Tensor]) -> str:
    summary = hashlib.sha256()
    for name, tensor in tensors.items():
        summary.update(name.encode() + tensor.detach().float().numpy().tobytes())
    return summary.hexdigest()


@pytest.mark.parametrize("engine", ENGINES)
def test_state_that_moves_is_the_same_to_the_last_bit(engine: str, tmp_path: Path) -> None:
    assert run_on_ranks(2, train, engine, str(tmp_path)) == [[], []]
