"""Every choice goes on from a checkpoint as if it had not stopped: to the last bit, in weights and in what it reports.

The resumed run begins with other weights, and has nothing but the files.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.choices import CASES, WORLD_SIZE, take
from tests.distributed.test_resume import OTHER_WEIGHTS, load, save
from tests.distributed.training import ALSO_OFFLOADED, ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3, Training, max_error, slow
from tests.ranks import run_on_ranks

ENGINES = [slow("local"), slow("fsdp2"), ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3, *ALSO_OFFLOADED]


def interrupt(engine: str, dtype: torch.dtype, names: Sequence[str], folder: str) -> dict[str, list[str]]:
    """By case: in what a run that was saved half way and resumed differs from one that was neither."""
    differences = {}
    for name in names:
        case = CASES[name]
        setup, length = case.setup(engine, dtype=dtype), len(case.choices)
        whole, saved = Training(setup, total_steps=length), Training(setup, total_steps=length)
        resumed = Training(replace(setup, model=OTHER_WEIGHTS), total_steps=length)
        differences[name] = different = []
        for step in range(1, length + 1):
            if step == length // 2 + 1:
                save(saved, f"{folder}/{name}")
                load(resumed, f"{folder}/{name}")
            found = take(saved if step <= length // 2 else resumed, case, step)
            if found != take(whole, case, step):
                different.append(f"report of step {step}")
        same = {
            "weights": max_error(resumed.live_weights(), whole.live_weights()) == 0.0,
            "masters": max_error(resumed.weights(), whole.weights()) == 0.0,
            "state": resumed.slsam.state_dict() == whole.slsam.state_dict(),
        }
        different += [what for what, is_same in same.items() if not is_same]
    return differences


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_choice_is_resumed_to_the_last_bit(engine: str, dtype: torch.dtype, tmp_path: Path) -> None:
    nothing: dict[str, list[str]] = {name: [] for name in CASES}
    found = run_on_ranks(WORLD_SIZE, interrupt, engine, dtype, list(CASES), str(tmp_path), timeout=480)
    assert found == [nothing] * WORLD_SIZE
