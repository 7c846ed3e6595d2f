"""SLSAMTrainer inside the real Hugging Face Trainer, on two ranks."""

import functools
import gc
import itertools
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging import version
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from slsam_ds.integrations.huggingface import SLSAMMixin
from slsam_ds.records.files import read_steps
from tests.distributed.training import ALSO_ZERO0, ALSO_ZERO1, slow, whole
from tests.models import arms_of_llama, micro_batch, tiny_llama
from tests.ranks import run_on_ranks
from tests.reference import Reference
from tests.step_records import without_times

ACCUMULATION = 2
CLIP = 0.5


class Sequences(Dataset):
    """Random tokens, as many in each sample.

    The first has no label, which no loss asks for: transformers before 5.11 divides by the number of all labels.
    """

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = {name: tokens[0].clone() for name, tokens in micro_batch(index, 0, 0, batch_size=1).items()}
        sample["labels"][0] = -100
        return sample


class RecordingTrainer(SLSAMMixin, Trainer):
    """A trainer of somebody's own: keeps the windows it was given and counts its losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows: list[Any] = []
        self.num_losses = itertools.count()  # no number: what a trainer counts is counted once

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        window, num_items = super().get_batch_samples(*args, **kwargs)
        self.windows.append([{name: tokens.clone() for name, tokens in batch.items()} for batch in window])
        return window, num_items

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        next(self.num_losses)
        return super().compute_loss(*args, **kwargs)


FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "reshard_after_forward": True,
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "none": {"deepspeed": None},
    "fsdp2": {"deepspeed": None, **FSDP},
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
}
KNOBS = {"active_layers": 2, "rho": 0.02, "seed": 1}


def make_trainer(output_dir: str, *, stage: int = 2, **kwargs: Any) -> RecordingTrainer:
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage},
        "slsam": KNOBS,
    }
    slsam = kwargs.pop("slsam", KNOBS if "deepspeed" in kwargs else None)
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "deepspeed": deepspeed,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **kwargs,
    }
    return RecordingTrainer(
        model=tiny_llama(),
        args=TrainingArguments(**settings),
        train_dataset=Sequences(),
        eval_dataset=[Sequences()[index] for index in range(4)],
        slsam=slsam,
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: whole(parameter).clone() for name, parameter in trainer.model.named_parameters()}


def train(output_dir: str, engine: str) -> tuple[dict[str, Tensor], list[Any], list[dict[str, Any]], int]:
    trainer = make_trainer(output_dir, **ENGINES[engine])
    trainer.train()
    return weights(trainer), trainer.windows, trainer.state.log_history, next(trainer.num_losses)


@pytest.mark.parametrize("engine", ["none", "fsdp2", ALSO_ZERO0, ALSO_ZERO1, "zero2"])
def test_it_follows_the_reference_and_records_every_step(engine: str, tmp_path: Path) -> None:
    per_rank = run_on_ranks(2, train, str(tmp_path), engine)
    (trained, windows, history, num_losses), (_, other_windows, *_) = per_rank
    assert not torch.equal(windows[0][0]["input_ids"], other_windows[0][0]["input_ids"])
    model = tiny_llama()
    reference = Reference(model, arms_of_llama(model), rho=0.02, weight_decay=0.0, clip=CLIP)
    records = read_steps(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 7))
    for record, window, other in zip(records, windows, other_windows, strict=True):
        scale = {arm: min(1 / record["probabilities"][arm], 10.0) for arm in record["active"]}
        expected = reference.step(record["active"], window + other, scale.__getitem__)
        assert record["ascent_loss"] == pytest.approx(expected["ascent_loss"], abs=1e-5)
    # Ten times the error of the plain engines' test: the trainer's loss divides by the number of tokens, in float32.
    assert max((trained[name] - weight).abs().max().item() for name, weight in model.named_parameters()) <= 1e-5
    tried = {min(record["active"]) for record in records if min(record["active"]) > 2}  # two blocks are below, or more
    assert num_losses == 6 * 2 * ACCUMULATION + 2 * len(tried)
    logged = [entry["loss"] for entry in history if "loss" in entry]
    assert logged == pytest.approx([record["ascent_loss"] for record in records], abs=1e-3)
    rises = [entry["slsam/ascent_rise"] for entry in history if "loss" in entry]
    assert rises == pytest.approx([record["loss"] - record["ascent_loss"] for record in records])


def train_apart(output_dir: str) -> tuple[int, dict[str, Tensor]]:
    """Ranks that begin with other weights: how many wrappers there are in a step, and what comes of it."""
    wrappers: list[Any] = []

    class Looking(RecordingTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            wrappers.extend(each for each in gc.get_objects() if type(each) is nn.parallel.DistributedDataParallel)
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(output_dir, deepspeed=None, max_steps=2)
    trainer.__class__ = Looking
    if trainer.args.process_index > 0:
        for parameter in trainer.model.parameters():
            nn.init.normal_(parameter)
    trainer.train()
    trainer.evaluate()
    return len(wrappers), weights(trainer)


def test_replicas_begin_alike_and_pay_for_no_wrapper(tmp_path: Path) -> None:
    """Which would hold a buffer of every gradient, and be called by nobody."""
    (num_wrappers, first), (_, other) = run_on_ranks(2, train_apart, str(tmp_path))
    assert num_wrappers == 0
    assert all(torch.equal(first[name], other[name]) for name in first)


def train_cheaply(output_dir: str, knobs: dict[str, Any], accumulation: int) -> tuple[list[Any], int]:
    trainer = make_trainer(output_dir, slsam=KNOBS | knobs, gradient_accumulation_steps=accumulation, deepspeed=None)
    trainer.train()
    return trainer.windows, next(trainer.num_losses)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_ascent_on_half_the_samples_reports_their_mean_loss(accumulation: int, tmp_path: Path) -> None:
    """Of two micro-batches it takes one, of one its first sample; the trainer counts tokens anew for either."""
    windows, num_losses = run_on_ranks(1, train_cheaply, str(tmp_path), {"ascent_fraction": 0.5}, accumulation)[0]
    assert num_losses == 6 * (1 + accumulation)
    batch = windows[0][0]
    climbed = batch if accumulation == 2 else {name: tensor[:1] for name, tensor in batch.items()}
    expected = tiny_llama()(**climbed).loss.item()
    assert read_steps(tmp_path)[0]["ascent_loss"] == pytest.approx(expected, abs=1e-5)


def test_climbing_along_previous_gradients_runs_each_micro_batch_once(tmp_path: Path) -> None:
    _, num_losses = run_on_ranks(1, train_cheaply, str(tmp_path), {"ascent_source": "previous"}, 2)[0]
    assert num_losses == 6 * 2


def train_halves(output_dir: str, engine: str, stop_at: int | None, resume: bool, **kwargs: Any) -> dict[str, Tensor]:
    schedule = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(output_dir, **ENGINES[engine], **schedule, **kwargs)
    if stop_at:
        trainer.args.max_steps = stop_at
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-3" if resume else None)
    return weights(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", "fsdp2", "zero0", "zero1", "zero2"])
def test_resume_from_a_trainer_checkpoint_is_bit_identical(engine: str, tmp_path: Path) -> None:
    knobs = KNOBS | {"mask": "fisher", "mask_every": 2, "offload_state": True}
    train = functools.partial(train_halves, slsam=knobs)
    whole_run = run_on_ranks(2, train, str(tmp_path / "whole"), engine, None, False)[0]
    run_on_ranks(2, train, str(tmp_path / "halves"), engine, 4, False)  # dies after its checkpoint of step 3
    assert [record["step"] for record in read_steps(tmp_path / "halves")] == [1, 2, 3, 4]
    resumed = run_on_ranks(2, train, str(tmp_path / "halves"), engine, None, True)[0]
    assert all(torch.equal(resumed[name], whole_run[name]) for name in whole_run)
    expected, found = read_steps(tmp_path / "whole"), read_steps(tmp_path / "halves")
    assert without_times(found) == without_times(expected)


@pytest.mark.parametrize("engine", ["none", *map(slow, ("fsdp2", "zero0", "zero1", "zero2", "zero3"))])
def test_resume_by_another_number_of_ranks(engine: str, tmp_path: Path) -> None:
    """With as many samples per step. Three steps on a layer each leave most of the six without optimizer state."""
    train = functools.partial(train_halves, slsam=KNOBS | {"active_layers": 1, "ascent_source": "previous"})
    whole_run = run_on_ranks(2, train, str(tmp_path), engine, None, False)[0]
    steps = read_steps(tmp_path)
    alone = functools.partial(train, gradient_accumulation_steps=2 * ACCUMULATION)
    resumed = run_on_ranks(1, alone, str(tmp_path), engine, None, True)[0]
    assert max((resumed[name] - whole_run[name]).abs().max().item() for name in whole_run) <= 1e-6
    assert [record["active"] for record in read_steps(tmp_path)] == [record["active"] for record in steps]


def build(output_dir: str, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as raised:
        make_trainer(output_dir, **kwargs)
    return str(raised.value)


def test_what_is_not_supported_is_refused_at_construction(tmp_path: Path) -> None:
    def message(world_size: int, **kwargs: Any) -> str:
        return run_on_ranks(world_size, functools.partial(build, **kwargs), str(tmp_path))[0]

    assert "needs DeepSpeed" in message(1, deepspeed=None, fp16=True)
    if version.parse(accelerate.__version__) >= version.parse("1.13"):  # before, it counts ranks on the CPU by itself
        assert "use_cpu=True" in message(2, use_cpu=False)
    assert "did you mean rho?" in message(1, slsam={"rhoo": 0.1})
    for optim in ("lomo", "galore_adamw_layerwise"):
        assert f"optim={optim}: updates weights while gradients" in message(1, deepspeed=None, optim=optim)
