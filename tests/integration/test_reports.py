"""What users of Trainers reported: with every layer active and a radius of zero, SL-SAM is the trainer without it."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.records.files import read_steps
from tests.distributed.training import slow, whole
from tests.integration.engines import ENGINES
from tests.models import NUM_BLOCKS, VOCABULARY, tiny_llama
from tests.ranks import run_on_ranks

PLAIN = {"selector": "all", "rho": 0.0}


def rows(number: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (number, 10), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


class Stream(torch.utils.data.IterableDataset):
    """Of a length that nobody knows."""

    def __iter__(self) -> Iterator[Any]:
        return iter(rows(20))


def make(cls: type[Trainer], folder: str, engine: str, data: Any = None, slsam: Any = PLAIN, **settings: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,  # with Adam's own, rounding noise becomes moves where a gradient is nearly zero
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **copy.deepcopy(ENGINES[engine]),  # Accelerate fills in what is "auto"
        **settings,
    }
    given: dict[str, Any] = {"slsam": slsam} if cls is SLSAMTrainer else {}
    if "optimizer_cls_and_kwargs" in settings:
        given["optimizer_cls_and_kwargs"] = settings.pop("optimizer_cls_and_kwargs")
    args = TrainingArguments(output_dir=folder, **settings)
    return cls(model=tiny_llama(), args=args, train_dataset=rows(24) if data is None else data, **given)


def trained(trainer: Any, **kwargs: Any) -> Any:
    trainer.train(**kwargs)
    return trainer


Report = Callable[[type[Trainer], str, str], Any]


def stream_ends_within_a_window(cls: type[Trainer], folder: str, engine: str) -> Any:
    """Five batches an epoch on two ranks, ten on one: the trainer accumulates over the end of the epoch."""
    return trained(make(cls, folder, engine, Stream(), gradient_accumulation_steps=3, max_steps=6))


def resume_with_another_accumulation(cls: type[Trainer], folder: str, engine: str) -> Any:
    """Four micro-batches are behind it, and windows have three now: the first one has two."""
    trained(make(cls, folder, engine, save_strategy="steps", save_steps=2, max_steps=2))
    trainer = make(cls, folder, engine, gradient_accumulation_steps=3, max_steps=5)
    return trained(trainer, resume_from_checkpoint=f"{folder}/checkpoint-2")


class Counting(torch.optim.Optimizer):
    """Keeps in its groups how often it has stepped, as schedule-free optimizers do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "num_steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["num_steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / group["num_steps"])


def optimizer_that_counts_its_steps(cls: type[Trainer], folder: str, engine: str) -> Any:
    return trained(make(cls, folder, engine, optimizer_cls_and_kwargs=(Counting, {"lr": 1.0})))


def parameters_that_are_always_trained(cls: type[Trainer], folder: str, engine: str) -> Any:
    """The logged norm is that of all gradients, theirs among them."""
    blocks = [f"model.layers.{index}" for index in range(NUM_BLOCKS)]
    return trained(make(cls, folder, engine, slsam={**PLAIN, "layers": blocks, "other_parameters": "always"}))


REPORTS: dict[str, Report] = {
    report.__name__: report
    for report in (
        stream_ends_within_a_window,
        resume_with_another_accumulation,
        optimizer_that_counts_its_steps,
        parameters_that_are_always_trained,
    )
}


def outcome(report: str, cls: type[Trainer], folder: str, engine: str) -> dict[str, Any]:
    trainer = REPORTS[report](cls, folder, engine)
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "numbers": [
            entry[name] for entry in history for name in ("loss", "grad_norm", "learning_rate") if name in entry
        ],
        "weights": {name: whole(weight).clone() for name, weight in trainer.model.named_parameters()},
    }


def outcomes(folder: str, engine: str) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for report in REPORTS:
        # Under ZeRO-3 such an optimizer counts, without SL-SAM, once for each of its groups.
        stock = "none" if (report, engine) == ("optimizer_that_counts_its_steps", "zero3") else engine
        found[report] = [
            outcome(report, cls, f"{folder}/{report}/{cls.__name__}", where)
            for cls, where in ((Trainer, stock), (SLSAMTrainer, engine))
        ]
    return found


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - weight).abs().max().item() for name, weight in second.items())


@pytest.mark.parametrize(("num_ranks", "engine"), [(1, "none"), slow(2, "none"), (2, "zero2"), slow(2, "zero3")])
def test_it_is_the_trainer_without_it(num_ranks: int, engine: str, tmp_path: Path) -> None:
    for report, (stock, ours) in run_on_ranks(num_ranks, outcomes, str(tmp_path), engine)[0].items():
        assert ours["steps"] == stock["steps"], report
        assert ours["numbers"] == pytest.approx(stock["numbers"], rel=1e-5), report
        assert distance(ours["weights"], stock["weights"]) <= 1e-6, report
        assert len(read_steps(tmp_path / report / "SLSAMTrainer")) == ours["steps"], report


def train_twice(folder: str) -> str:
    trainer = trained(make(SLSAMTrainer, folder, "zero2", max_steps=1))
    with pytest.raises(ValueError, match="under DeepSpeed, a trainer can train only once") as refused:
        trainer.train()
    return str(refused.value)


def test_a_second_training_under_deepspeed_is_refused(tmp_path: Path) -> None:
    """The trainer without it ends with `'NoneType' object has no attribute 'backward'`."""
    assert "create a new trainer" in run_on_ranks(1, train_twice, str(tmp_path))[0]
