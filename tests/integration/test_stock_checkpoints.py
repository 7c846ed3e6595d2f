"""A run of a stock Trainer goes on with SL-SAM and back: at rho 0, with every layer, as if nothing had changed."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from slsam_ds.engines.deepspeed import to_stock
from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.records.files import read_steps
from tests.distributed.training import max_error, slow
from tests.integration.engines import ENGINES
from tests.integration.test_trainer import CLIP, Sequences, weights
from tests.models import tiny_llama
from tests.ranks import run_on_ranks

STEPS = 4
TOLERANCE = 1e-6  # fp32: groups by layer are reduced and clipped in another order


def make_trainer(kind: type[Trainer], output_dir: str, engine: str, **kwargs: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_epsilon=1e-4,
        max_grad_norm=CLIP,
        lr_scheduler_type="linear",
        warmup_steps=1,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **ENGINES[engine],
    )
    if kind is SLSAMTrainer:
        kwargs = {"slsam": {"rho": 0.0, "selector": "all"}, **kwargs}
    return kind(model=tiny_llama(), args=args, train_dataset=Sequences(), **kwargs)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(trainer: Trainer, resume: str | bool | None = None) -> tuple[dict[str, Tensor], list[float]]:
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def there_and_back(output_dir: str, engine: str) -> dict[str, Any]:
    """A stock run; ours goes on from its half; and a stock one from where ours is a step later."""
    lines = Lines()
    logging.getLogger("slsam_ds").addHandler(lines)
    runs = {"stock": train(make_trainer(Trainer, f"{output_dir}/stock", engine))}
    runs["ours"] = train(make_trainer(SLSAMTrainer, f"{output_dir}/ours", engine), f"{output_dir}/stock/checkpoint-2")
    checkpoint = f"{output_dir}/ours/checkpoint-3"
    if engine != "none":
        converted = f"{output_dir}/converted"
        if torch.distributed.get_rank() == 0:
            assert to_stock.main([checkpoint, converted]) == 0
        torch.distributed.barrier()
        checkpoint = converted
    runs["back"] = train(make_trainer(Trainer, f"{output_dir}/back", engine), checkpoint)
    return {**runs, "lines": lines.lines}


@pytest.mark.parametrize("engine", ["none", "zero2", slow("zero3")])
def test_there_and_back(engine: str, tmp_path: Path) -> None:
    found, other = run_on_ranks(2, there_and_back, str(tmp_path), engine)
    (stock, losses), (ours, our_losses) = found["stock"], found["ours"]
    assert max_error(ours, stock) <= TOLERANCE
    assert our_losses == pytest.approx(losses, abs=1e-4)  # as the trainer rounds them
    assert [record["step"] for record in read_steps(tmp_path / "ours")] == [3, 4]
    assert found["lines"] == ["continuing after 2 steps without SL-SAM: the bandit starts anew"]
    assert other["lines"] == []
    assert max_error(found["back"][0], stock) <= TOLERANCE
