"""What DeepSpeed would make of all layers at once when it is initialised is not made, and nothing misses it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slsam_ds.engines.deepspeed import build
from tests.distributed.training import Setup, Training, max_error, slow
from tests.models import SAMPLES, window
from tests.ranks import run_on_ranks

ZEROS = {torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default}
HALF = 5


class Zeros(TorchDispatchMode):
    """Counts the elements of what is made of zeros; a layer's at the least."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if operator in ZEROS and made.numel() > 32 and made.device.type != "meta":
            self.numel += made.numel()
        return made


def start(setup: Setup) -> tuple[int, int]:
    """Elements of zeros that are made, and state that is there, before the first step."""
    with Zeros() as zeros:
        training = Training(setup)
    return zeros.numel, len(training.slsam.engine.optimizer.state)


ENGINES = [
    ("zero0", torch.bfloat16),
    slow("zero0", torch.float32),
    slow("zero1", torch.float32),
    ("zero2", torch.bfloat16),
]


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_there_is_nothing_of_any_layer_before_the_first_step(engine: str, dtype: torch.dtype) -> None:
    assert run_on_ranks(2, start, Setup(engine=engine, dtype=dtype)) == [(0, 0)] * 2


@contextlib.contextmanager
def as_stock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "without_initial_state", contextlib.nullcontext)
        yield


def train_both(setup: Setup, folder: str) -> tuple[float, float]:
    """How far our start leads away from DeepSpeed's own; and a resume from a checkpoint of the latter."""
    with as_stock():
        stock = Training(setup)
    lean = Training(setup)
    for step, sample in enumerate(SAMPLES, start=1):
        for name, training in (("stock", stock), ("lean", lean)):
            training.step(window(step, training.rank, 1), active=sample)
            if step == HALF:
                training.engine.save_checkpoint(f"{folder}/{name}")
    resumed = Training(replace(setup, model={"seed": 1}))
    resumed.engine.load_checkpoint(f"{folder}/stock")
    for step, sample in enumerate(SAMPLES[HALF:], start=HALF + 1):
        resumed.step(window(step, resumed.rank, 1), active=sample)
    expected = stock.weights()
    return max_error(lean.weights(), expected), max_error(resumed.weights(), expected)


@pytest.mark.parametrize(("engine", "dtype"), [*ENGINES, slow("zero2_offload", torch.float32)])
def test_it_trains_and_resumes_all_the_same(engine: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert run_on_ranks(2, train_both, Setup(engine=engine, dtype=dtype), str(tmp_path)) == [(0.0, 0.0)] * 2
