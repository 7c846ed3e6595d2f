"""Choosing by cost: counted FLOPs are what was promised, and every engine and rank chooses alike."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from slsam_ds import SLSAM, SLSAMConfig
from slsam_ds.pricing.cost import CostModel
from tests.distributed.training import ALSO_ZERO0, ALSO_ZERO1, ALSO_ZERO3, LlamaSetup, Setup, Training, max_error, slow
from tests.models import micro_batch, tiny_llama
from tests.ranks import run_on_ranks

NUM_BLOCKS = 8


def make(window_length: int = 1, *, tied: bool = False, lora: bool = False, **knobs: Any) -> SLSAM:
    model: Any = tiny_llama(num_blocks=NUM_BLOCKS, tied=tied)
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    return SLSAM(model, torch.optim.AdamW(model.parameters(), lr=1e-4), SLSAMConfig(**knobs))


def make_window(step: int, length: int) -> list[dict[str, Tensor]]:
    return [micro_batch(step, 0, index, length=16) for index in range(length)]


def try_prefixes(slsam: SLSAM, window_length: int = 1) -> None:
    """Take a step with each layer alone: the first descent above so many blocks costs two more runs."""
    for arm in range(len(slsam.layers)):
        slsam.step(make_window(1, window_length), active=[arm])


def flops(slsam: SLSAM, step: int, window_length: int = 1, **kwargs: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        slsam.step(make_window(step, window_length), **kwargs)
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    ("window_length", "knobs"),
    [
        (1, {}),
        (1, {"tied": True}),
        (1, {"lora": True}),
        slow(1, {"other_parameters": "freeze"}),
        (1, {"other_parameters": "always"}),
        (1, {"prefix_reuse": False}),
        slow(4, {"ascent_fraction": 0.25}),
        slow(1, {"ascent_fraction": 0.5}),
        (2, {"ascent_fraction": 0.125}),
        (1, {"ascent_source": "previous"}),
        (1, {"rho": 0.0}),
    ],
)
def test_prices_are_the_flops_counted(window_length: int, knobs: dict[str, Any]) -> None:
    slsam = make(reward="grad_norm_per_cost", **knobs)
    others = {name: knobs[name] for name in ("tied", "lora", "other_parameters") if name in knobs}
    adamw = flops(make(rho=0.0, selector="all", **others), 1, window_length)
    try_prefixes(slsam, window_length)  # and counts
    passes = slsam.workload(make_window(1, window_length))
    last = len(slsam.layers) - 1
    for step, sample in enumerate(([0], [1], [2], [5, 7], [last], [3, last], range(last + 1)), start=2):
        paid = flops(slsam, step, window_length, active=sample) / adamw
        assert slsam._pricing.costs.prices(passes).of(tuple(sample)) == pytest.approx(paid, rel=1e-3), sample


@pytest.mark.parametrize(
    "knobs", [{}, {"tied": True}, {"lora": True}, {"other_parameters": "freeze"}, {"other_parameters": "always"}]
)
def test_prices_by_weights_are_near_the_flops_counted(knobs: dict[str, Any]) -> None:
    slsam = make(reward="grad_norm_per_cost", **knobs)
    slsam.step(make_window(1, 1))
    workload, last = slsam.workload(make_window(1, 1)), len(slsam.layers) - 1
    by_weights = CostModel.by_weights(slsam.layers)
    for sample in ([0], [2], [5, 7], [last], range(last + 1)):
        counted = slsam._pricing.costs.price(sample, sample, workload)
        assert by_weights.price(sample, sample, workload) == pytest.approx(counted, rel=0.15), sample


def test_prices_know_that_checkpointing_takes_backward_all_the_way() -> None:
    """transformers then makes the embeddings' output require a gradient, whatever is sampled."""

    def make_checkpointed(**knobs: Any) -> SLSAM:
        slsam = make(**knobs)
        slsam.model.gradient_checkpointing_enable({"use_reentrant": False})
        return slsam

    slsam = make_checkpointed(reward="grad_norm_per_cost", prefix_reuse=False)
    adamw = flops(make_checkpointed(rho=0.0, selector="all"), 1)
    flops(slsam, 1)  # counts
    prices = slsam._pricing.costs.prices(slsam.workload(make_window(1, 1)))
    for step, sample in enumerate(([0], [5], [NUM_BLOCKS + 1], [3, 7]), start=2):
        assert prices.of(sample) == pytest.approx(flops(slsam, step, active=sample) / adamw, rel=1e-3), sample


@pytest.mark.parametrize(("budget", "num_steps"), [(0.7, 80), *(slow(budget, 200) for budget in (0.7, 0.85, 1.0, 1.2))])
def test_steps_cost_the_budget_on_average(budget: float, num_steps: int) -> None:
    torch.set_num_threads(1)
    slsam = make(budget=budget)
    adamw = flops(make(rho=0.0, selector="all"), 1)
    try_prefixes(slsam)  # and counts
    paid = sum(flops(slsam, step) for step in range(2, num_steps + 2)) / num_steps / adamw
    assert paid == pytest.approx(budget, rel=0.03)


def train(setup: Setup, num_steps: int, reentrant: bool | None) -> tuple[list[tuple[int, ...]], dict[str, Tensor]]:
    training = Training(setup)
    if reentrant is not None:
        training.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        training.model.enable_input_require_grads()
    results = [training.step(training.window(step)) for step in range(1, num_steps + 1)]
    return [result.active for result in results], training.weights()


@pytest.mark.parametrize("knobs", [{"budget": 1.0}, slow({"reward": "grad_norm_per_cost", "active_layers": 2})])
@pytest.mark.parametrize("engine", ["fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3])
def test_every_engine_chooses_alike(engine: str, knobs: dict[str, Any]) -> None:
    model = {"num_blocks": 6}
    expected, weights = run_on_ranks(2, train, Setup(engine="local", slsam=knobs, model=model), 12, None)[0]
    assert len(set(expected)) > 4
    for active, trained in run_on_ranks(2, train, Setup(engine=engine, slsam=knobs, model=model), 12, None):
        assert active == expected
        assert max_error(trained, weights) <= 1e-5  # learning rates up to ten times as large


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_counted(reentrant: bool) -> None:
    # Backward goes all the way down: less than 1.5 of AdamW's price is not to be had.
    setup = LlamaSetup(engine="zero2", slsam={"budget": 1.7}, model={"num_blocks": 6})
    active, _ = run_on_ranks(2, train, setup, 6, reentrant)[0]
    assert all(active)


def resume(setup: Setup, folder: str, half: str) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    training = Training(setup)
    if half == "second":
        training.engine.load_checkpoint(folder)
    steps = {"whole": range(1, 9), "first": range(1, 5), "second": range(5, 9)}[half]
    active = [training.step(training.window(step)).active for step in steps]
    if half == "first":
        training.engine.save_checkpoint(folder)
    return training.weights(), active


def test_resume_keeps_the_prices(tmp_path: Any) -> None:
    setup = Setup(engine="zero2", slsam={"budget": 1.0}, model={"num_blocks": 6})
    weights, active = run_on_ranks(2, resume, setup, str(tmp_path), "whole")[0]
    _, first = run_on_ranks(2, resume, setup, str(tmp_path), "first")[0]
    resumed, second = run_on_ranks(2, resume, setup, str(tmp_path), "second")[0]
    assert first + second == active
    assert max_error(resumed, weights) == 0.0
