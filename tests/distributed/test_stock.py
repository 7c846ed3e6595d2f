"""A run of a stock loop goes on with SL-SAM and back: at rho 0, with every layer in every step, as if it had not."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from slsam_ds import SLSAM, given_groups
from slsam_ds.engines.deepspeed import to_stock
from slsam_ds.engines.torch_checkpoint import complete_state, load, save
from tests.distributed.training import ADAMW, Setup, Training, max_error, slow, whole
from tests.models import window
from tests.ranks import run_on_ranks

STEPS, HALF = 6, 3
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = 1e-6  # fp32: groups by layer are reduced and clipped in another order
AS_ADAMW = {"rho": 0.0, "selector": "all"}
DEEPSPEED = {"gradient_clipping": 1.0}


def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """With and without weight decay, as most people write them: both have parameters of every block."""
    every = list(parameters)
    decayed, rest = ([p for p in every if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], **ADAMW)


def declining(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def run_stock(
    setup: Setup, folder: str, resumed: str | None = None, ours: str | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """A loop as DeepSpeed documents it, which saves half way; or goes on from a checkpoint.

    From one of ours it can only load the weights, which are then those of the one that was converted.
    """
    model = setup.build_model()
    config = {key: value for key, value in setup.deepspeed_config().items() if key != "slsam"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=two_groups(model.parameters()), lr_scheduler=declining, config=config
    )
    if ours is not None:
        engine.load_checkpoint(ours, load_module_only=True, load_optimizer_states=False)
        weights = masters(model)
    if resumed is not None:
        engine.load_checkpoint(resumed)
    if ours is not None and setup.dtype == FP32:
        assert max_error(masters(model), weights) == 0.0
    losses = []
    for step in range(engine.global_steps + 1, STEPS + 1):
        (batch,) = window(step, 0, 1)  # the same on every rank, however many there are
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
        if step == HALF and resumed is None:
            engine.save_checkpoint(folder)
    return losses[HALF:], masters(model)


def masters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole and in float32, as DeepSpeed steps it."""
    found = {}
    for name, parameter in model.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        found[name] = (whole(parameter) if master is None else master).clone()  # without ZeRO there is none
    return found


def go_on(setup: Setup, folder: str, ours: str) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """With SL-SAM from the stock checkpoint; saves after a step."""
    training = Training(setup, make_optimizer=two_groups, lr_scheduler=declining)
    training.engine.load_checkpoint(folder)
    losses = []
    for step in range(HALF + 1, STEPS + 1):
        losses.append(training.step(window(step, 0, 1)).loss)
        if step == HALF + 1:
            training.engine.save_checkpoint(ours)
    return losses, masters(training.model), training.slsam.state_dict()


@pytest.mark.parametrize(
    ("engine", "dtype", "num_ranks"),
    [
        ("zero2", FP32, 2),
        ("zero3", FP32, 2),
        *starmap(slow, [("zero0", FP32, 2), ("zero1", FP32, 2), ("zero2", FP32, 3), ("zero3", FP32, 3)]),
        *starmap(slow, [("zero2", BF16, 2), ("zero3", BF16, 2), ("zero2_offload", FP32, 2)]),
    ],
)
def test_a_stock_loop_goes_on_and_back(engine: str, dtype: torch.dtype, num_ranks: int, tmp_path: Path) -> None:
    stock, ours, back = (str(tmp_path / name) for name in ("stock", "ours", "back"))
    setup = Setup(engine=engine, dtype=dtype, slsam=AS_ADAMW, deepspeed=DEEPSPEED)
    losses, weights = run_on_ranks(2, run_stock, setup, stock)[0]
    other = replace(setup, model={"seed": 1})  # nothing but the files is left
    found, reached, state = run_on_ranks(num_ranks, go_on, other, stock, ours)[0]
    assert found == pytest.approx(losses, abs=TOLERANCE)
    assert max_error(reached, weights) <= TOLERANCE
    assert state["step"] == STEPS
    assert state["updates"] == [STEPS] * 6
    if engine == "zero0":  # needs no converting
        arguments = [ours]
    else:
        assert to_stock.main([ours, back]) == 0
        arguments = [back, ours]
    _, reached = run_on_ranks(num_ranks, run_stock, other, stock, *arguments)[0]
    assert max_error(reached, weights) <= TOLERANCE


def through_fsdp2(setup: Setup, stock: str, ours: str) -> list[dict[str, Tensor]]:
    """As a Trainer saves and loads with FSDP2: a stock run, SL-SAM's from its half, a stock one from where that was."""

    def steps(model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        for step in range(first, last + 1):
            model(**window(step, 0, 1)[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def begin(seed: int) -> tuple[Any, torch.optim.Optimizer, LambdaLR]:
        model = replace(setup, model={"seed": seed}).build_model()
        setup.shard(model)
        optimizer = two_groups(model.parameters())
        return model, optimizer, declining(optimizer)

    def weights_of(model: nn.Module) -> dict[str, Tensor]:
        return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}

    first, optimizer, scheduler = begin(0)
    steps(first, optimizer, scheduler, 1, HALF)
    save(Path(stock), first, optimizer)
    schedule = copy.deepcopy(scheduler.state_dict())
    steps(first, optimizer, scheduler, HALF + 1, STEPS)

    second, optimizer, scheduler = begin(1)
    slsam = SLSAM(second, optimizer, AS_ADAMW, lr_scheduler=scheduler)
    slsam.complete_optimizer_state()
    with given_groups(optimizer, scheduler):
        load(Path(stock), second, optimizer)
        scheduler.load_state_dict(schedule)
    slsam.start_after(HALF)
    for step in range(HALF + 1, STEPS + 1):
        slsam.step(window(step, 0, 1))
        scheduler.step()
        if step == HALF + 1:
            with given_groups(optimizer, scheduler):
                save(Path(ours), second, optimizer)
                schedule = copy.deepcopy(scheduler.state_dict())

    third, optimizer, scheduler = begin(1)
    complete_state(optimizer)
    load(Path(ours), third, optimizer)
    scheduler.load_state_dict(schedule)
    steps(third, optimizer, scheduler, HALF + 2, STEPS)
    return [weights_of(model) for model in (first, second, third)]


def test_fsdp2_goes_on_and_back(tmp_path: Path) -> None:
    setup = Setup(engine="fsdp2")
    stock, ours, back = run_on_ranks(2, through_fsdp2, setup, str(tmp_path / "stock"), str(tmp_path / "ours"))[0]
    assert max_error(ours, stock) <= TOLERANCE
    assert max_error(back, stock) <= TOLERANCE
