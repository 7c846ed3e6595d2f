"""A converted trainer is the class that one would derive by hand, and passes for the one that it was made of."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.conversion import converted
from slsam_ds.integrations.huggingface import SLSAMMixin, SLSAMTrainer
from tests.models import tiny_llama

KNOBS = SLSAMConfig(rho=0.02)


def choose(block: Any) -> SLSAMConfig:
    return KNOBS


class OwnTrainer(Trainer):
    """Of a script, with an initialiser of its own."""

    def __init__(self, *args: Any, extra: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = extra


class LoopTrainer(Trainer):
    """Steps where SL-SAM does not see it."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> None:
        self.state.global_step = 1


def make(trainer_class: type[Trainer], folder: Path, **given: Any) -> Any:
    args = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    return converted(trainer_class, choose)(model=tiny_llama(), args=args, train_dataset=[{}], **given)


def test_it_passes_for_the_original(tmp_path: Path) -> None:
    trainer = make(OwnTrainer, tmp_path, extra=3)
    assert isinstance(trainer, OwnTrainer)
    assert isinstance(trainer, SLSAMMixin)
    assert trainer.extra == 3
    assert trainer.slsam_config == KNOBS
    assert repr(type(trainer)) == repr(OwnTrainer)
    assert type(trainer).__doc__ == OwnTrainer.__doc__


def test_a_class_is_converted_once() -> None:
    made = converted(OwnTrainer, choose)
    assert converted(OwnTrainer, choose) is made
    assert converted(made, choose) is made


def test_copies_and_pickles_are_of_the_original(tmp_path: Path) -> None:
    trainer = make(OwnTrainer, tmp_path, extra=3)
    assert isinstance(copy.copy(trainer), OwnTrainer)
    assert pickle.loads(pickle.dumps(trainer)).extra == 3


@pytest.mark.parametrize("trainer_class", [SLSAMTrainer, type("Derived", (SLSAMMixin, OwnTrainer), {})])
def test_an_sl_sam_trainer_is_not_converted_again(trainer_class: type[Trainer]) -> None:
    with pytest.raises(ValueError, match=rf"{trainer_class.__name__}: is an SL-SAM trainer already"):
        converted(trainer_class, choose)


def test_a_loop_of_its_own_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="LoopTrainer: trained in a loop of its own"):
        make(LoopTrainer, tmp_path).train()
