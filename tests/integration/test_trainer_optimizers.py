"""Optimizers and schedulers that people bring to a Trainer: given, or made by a method that a subclass overrides."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor, AdafactorSchedule

from slsam_ds import SLSAM
from slsam_ds.integrations.huggingface import SLSAMMixin, SLSAMTrainer
from tests.distributed.training import whole
from tests.integration.engines import ENGINES
from tests.integration.test_trainer import Sequences
from tests.models import tiny_llama, window
from tests.ranks import run_on_ranks

RATE, NUM_STEPS = 1e-3, 5


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(two_groups(model), lr=RATE)


def decay(step: int) -> float:
    return 1 / (1 + step)


def scheduled(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [decay, decay])  # one for each of its groups


class Overridden(SLSAMMixin, Trainer):
    """As the documentation says: override and set; this one does not call what it overrides."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = adamw(model if model is not None else self.model)
        self.lr_scheduler = scheduled(self.optimizer)
        return self.optimizer


def train(folder: str, engine: str, how: str) -> tuple[dict[str, Tensor], list[float]]:
    args = TrainingArguments(
        output_dir=f"{folder}/{how}",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=NUM_STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **copy.deepcopy(ENGINES[engine]),  # Accelerate fills in what is "auto"
    )
    model = tiny_llama()
    optimizer: Any = adamw(model)
    schedule: Any = scheduled(optimizer)
    if how == "adafactor":
        optimizer = Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
        schedule = AdafactorSchedule(optimizer)
    given = {} if how == "overridden" else {"optimizers": (optimizer, schedule)}
    trainer = (Overridden if how == "overridden" else SLSAMTrainer)(
        model=model, args=args, train_dataset=Sequences(), slsam={"seed": 1, "active_layers": 2}, **given
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert trainer.slsam is not None
    assert trainer.slsam.progress.skipped_in_a_row == 0
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    moved = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    assert any(not torch.equal(moved[name], old) for name, old in before.items())
    return moved, rates


def each(folder: str, engine: str, hows: list[str]) -> dict[str, Any]:
    return {how: train(folder, engine, how) for how in hows}


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_optimizer_and_scheduler_of_ones_own_train_every_layer(engine: str, tmp_path: Any) -> None:
    hows = ["given", "overridden"] + (["adafactor"] if engine == "none" else [])
    found = run_on_ranks(2, each, str(tmp_path), engine, hows)[0]
    given, overridden = found["given"], found["overridden"]
    for name, weight in given[0].items():
        assert torch.equal(overridden[0][name], weight), name
    for _, rates in (given, overridden):
        assert rates == pytest.approx([RATE * decay(step) for step in range(NUM_STEPS)])


def relative(model: nn.Module) -> torch.optim.Optimizer:
    return Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=False, weight_decay=0.1)


@pytest.mark.parametrize("make", [relative, partial(torch.optim.Adafactor, lr=1e-2)])
def test_an_optimizer_with_a_rate_of_its_own_steps_and_is_saved(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    model = tiny_llama()
    optimizer = make(model) if make is relative else make(model.parameters())
    slsam = SLSAM(model, optimizer, {"seed": 1})
    assert ("update_scale=inverse_probability has no effect" in caplog.text) == (make is relative)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result = slsam.step(window(1, 0, 1), active=[2])
    inside = {name for name, _ in slsam.layers[2].parameters}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in inside), name
    assert not result.skipped
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    slsam.save_checkpoint(tmp_path / "checkpoint")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
