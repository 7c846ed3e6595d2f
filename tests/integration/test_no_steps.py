"""A training that would take no step is refused: its model would be saved untrained, and all would look well."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_trainer import Sequences, make_trainer
from tests.ranks import run_on_ranks


class Few(Sequences):
    """Seven samples."""

    def __len__(self) -> int:
        return 7


class Nothing(torch.utils.data.IterableDataset):
    """A stream that is over before it begins."""

    def __iter__(self) -> Any:
        return iter(())


CASES: list[tuple[dict[str, Any], type, str | None]] = [
    ({"dataloader_drop_last": True, "per_device_train_batch_size": 4}, Few, "7 samples make no batch for 2 ranks of 4"),
    ({"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_steps": -1}, Few, "leave out dataloader_dr"),
    ({"max_steps": 0}, Few, "max_steps=0 with num_train_epochs=3: no step would be taken"),
    ({"max_steps": -1, "num_train_epochs": 0}, Few, "max_steps=-1 with num_train_epochs=0: no step would be taken"),
    ({"accelerator_config": {"dispatch_batches": False}}, Nothing, "training ended without a step"),
    ({"dataloader_drop_last": True, "per_device_train_batch_size": 3, "max_steps": 1}, Few, None),
    ({"per_device_train_batch_size": 4, "max_steps": 1}, Few, None),
]


def refusals(output_dir: str) -> list[str | None]:
    """What each case is refused with; None: it trained."""
    return [_refusal(output_dir, settings, dataset) for settings, dataset, _ in CASES]


def _refusal(output_dir: str, settings: dict[str, Any], dataset: type) -> str | None:
    trainer = make_trainer(output_dir, deepspeed=None, **settings)
    trainer.train_dataset = dataset()
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    assert trainer.state.global_step > 0
    return None


def test_a_training_without_a_step_is_refused(tmp_path: Path) -> None:
    for found in run_on_ranks(2, refusals, str(tmp_path)):
        for refusal, (_, _, sentence) in zip(found, CASES, strict=True):
            if sentence is None:
                assert refusal is None
            else:
                assert sentence in str(refusal)
                assert "\n" not in str(refusal)


def _refused_early(output_dir: str) -> str:
    trainer = make_trainer(output_dir, stage=2, dataloader_drop_last=True, per_device_train_batch_size=8)
    trainer.train_dataset = Few()
    with pytest.raises(ValueError, match="samples") as refused:
        trainer.train()
    assert trainer.model_wrapped is trainer.model
    return str(refused.value)


def test_an_engine_is_not_even_built_for_it(tmp_path: Path) -> None:
    (refusal,) = run_on_ranks(1, _refused_early, str(tmp_path))
    assert "7 samples make no batch for 1 ranks of 8" in refusal
