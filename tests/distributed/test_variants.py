"""The same training on every engine, whatever is trained and by which optimizer: judged by one process without any."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Adafactor

from slsam_ds import SLSAM, SLSAMConfig, StepResult
from tests.distributed.training import (
    ADAMW,
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

ENGINES = [slow("local"), "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2", ALSO_ZERO3]
TOLERANCE = 1e-6  # as against the reference: sums are taken in another order
SAMPLES = ([0], [2], [1, 3], [0, 1, 2, 3], [3], [0, 2])
MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Lora(LlamaSetup):
    blocks = "base_model.model.model.layers"

    def build_model(self) -> nn.Module:
        model = super().build_model()
        torch.manual_seed(7)
        # Adapters away from their start at zero, where half of them have no gradient.
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(model, lora)


class PartlyFrozen(LlamaSetup):
    """The user has frozen the embeddings, the head, and a matrix of every block."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers" in name and "k_proj" not in name)
        return model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **ADAMW)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


def rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, eps=1e-3, centered=True)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    return Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False, warmup_init=False)


def follow(
    setup: Setup, make_optimizer: MakeOptimizer, free_steps: int = 0
) -> tuple[dict[str, Tensor], list[StepResult]]:
    training = Training(setup, make_optimizer=make_optimizer)
    if free_steps:
        results = [training.step(training.window(step)) for step in range(1, free_steps + 1)]
    else:
        results = training.follow(SAMPLES)
    return training.weights(), results


def judge(
    setup: Setup, make_optimizer: MakeOptimizer, world_size: int, free_steps: int = 0
) -> tuple[dict[str, Tensor], list[StepResult]]:
    """The windows of all ranks as one window of one process."""
    torch.set_num_threads(1)
    model = setup.build_model()
    slsam = SLSAM(model, make_optimizer(model.parameters()), SLSAMConfig(**setup.slsam))
    results = []
    for index in range(free_steps or len(SAMPLES)):
        batches = [batch for rank in range(world_size) for batch in window(index + 1, rank, setup.accumulation)]
        results.append(slsam.step(batches, active=None if free_steps else SAMPLES[index]))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}, results


UNTESTED = {"zero_allow_untested_optimizer": True}
VARIANTS: dict[str, tuple[Setup, MakeOptimizer]] = {
    "tied embeddings": (LlamaSetup(engine="", model={"tied": True}), adamw),
    "lora": (Lora(engine="", slsam={"rho": 0.02}), adamw),
    "frozen by the user": (PartlyFrozen(engine=""), adamw),
    "others always": (LlamaSetup(engine="", slsam={"other_parameters": "always"}), adamw),
    "others frozen": (LlamaSetup(engine="", slsam={"other_parameters": "freeze"}), adamw),
    "patterns": (
        LlamaSetup(
            engine="", slsam={"layers": ("model.layers.2", r".*\.0\.mlp.*", r".*[13]\.self_attn\.o.*", "lm_head")}
        ),
        adamw,
    ),
    "momentum": (LlamaSetup(engine="", deepspeed=UNTESTED), momentum),
    "rmsprop": (LlamaSetup(engine="", deepspeed=UNTESTED), rmsprop),
}


def on_engine(setup: Setup, engine: str) -> Setup:
    return dataclasses.replace(setup, engine=engine)


LESS_USUAL = ("others frozen", "patterns", "momentum")


@pytest.mark.parametrize("world_size", [2, slow(3)])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", [slow(name) if name in LESS_USUAL else name for name in VARIANTS])
def test_every_engine_trains_alike(variant: str, engine: str, world_size: int) -> None:
    setup, make_optimizer = VARIANTS[variant]
    expected, judged = judge(setup, make_optimizer, world_size)
    assert (
        max_error(expected, {name: weight.detach() for name, weight in setup.build_model().named_parameters()}) > 1e-3
    )
    per_rank = run_on_ranks(world_size, follow, on_engine(setup, engine), make_optimizer)
    for weights, results in per_rank:
        assert max_error(weights, expected) <= TOLERANCE
        for result, other in zip(results, judged, strict=True):
            assert result.grad_norms == pytest.approx(other.grad_norms, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("engine", [slow(engine) if engine == "fsdp2" else engine for engine in ENGINES])
def test_the_bandit_selects_the_same_layers_on_every_engine(engine: str) -> None:
    setup = LlamaSetup(engine=engine, accumulation=2, slsam={"active_layers": 2, "seed": 11, "rho": 0.02})
    expected, judged = judge(setup, adamw, world_size=2, free_steps=30)
    weights, results = run_on_ranks(2, follow, setup, adamw, 30)[0]
    assert [result.active for result in results] == [result.active for result in judged]
    assert results[-1].probabilities == pytest.approx(judged[-1].probabilities, rel=1e-5)
    assert max(results[-1].probabilities) > 1.05 * min(results[-1].probabilities)  # the bandit has learned something
    assert max_error(weights, expected) <= 10 * TOLERANCE  # 30 steps, learning rates up to ten times as large


@pytest.mark.parametrize("engine", ["local", "zero2"])
def test_adafactor_trains(engine: str) -> None:
    """No other engine's equal: ZeRO lays parameters out flat, where Adafactor has nothing to factor."""
    setup = LlamaSetup(engine=engine, deepspeed=UNTESTED)
    weights, results = run_on_ranks(2, follow, setup, adafactor)[0]
    assert all(weight.isfinite().all() for weight in weights.values())
    assert not any(result.skipped for result in results)
