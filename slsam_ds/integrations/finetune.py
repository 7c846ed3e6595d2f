"""The two halves of a fine-tuning run: build everything, then train, save and report."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from slsam_ds.integrations import demo
from slsam_ds.integrations.arguments import DataArguments
from slsam_ds.integrations.data import IGNORED, Columns, choose_columns, tokenize
from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.integrations.models import choose_max_length, load_model
from slsam_ds.integrations.report import summarize
from slsam_ds.integrations.rows import read_files, read_named
from slsam_ds.integrations.settings import Settings
from slsam_ds.integrations.usage import refusals, say, together
from slsam_ds.records import LAYERS_FILE, read_steps

_NUM_DEMO_VALIDATION = 64


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows, which of their columns to learn from, and what to call them in messages."""

    rows: Dataset
    columns: Columns
    source: str


def build_trainer(settings: Settings) -> SLSAMTrainer:
    """Load data and model and put them into a trainer.

    In stages that all ranks end together: one that failed must not leave the others in the next stage's collectives.

    Raises:
        SystemExit: Something of it cannot be used.
    """
    args = settings.training
    # The node's first rank fills the cache of `datasets`, the others read it. The demo's data are never cached.
    in_turn = nullcontext if settings.data.is_demo else args.main_process_first

    def read() -> tuple[Samples, Samples | None]:
        with in_turn():
            return read_samples(settings.data)

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
        # DeepSpeed keeps float32 masters of 16-bit weights; FSDP2 and autocast cast float32 weights themselves.
        low_precision = torch.float16 if args.fp16 else torch.bfloat16
        dtype = low_precision if args.deepspeed and (args.bf16 or args.fp16) else torch.float32
        model, tokenizer = load_model(settings.model, dtype)
        return model, tokenizer, choose_max_length(settings.data.max_length, model)

    def encode() -> list[Dataset | None]:
        with in_turn():
            return [
                samples and tokenize(samples.rows, tokenizer, samples.columns, max_length=length, source=samples.source)
                for samples in (training, validation)
            ]

    def build() -> SLSAMTrainer:
        args.eval_on_start = held_out is not None
        with refusals(ValueError):
            trainer = SLSAMTrainer(
                model=model,
                args=args,
                slsam=settings.slsam,
                train_dataset=trained_on,
                eval_dataset=held_out,
                processing_class=tokenizer,
                data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
            )
            settings.slsam.num_active(len(trainer.layer_map))  # refuses more than there are
        if settings.checkpoint is not None:
            with refusals(ValueError, prefix="--resume_from_checkpoint "):
                trainer.check_checkpoint(settings.checkpoint)
        return trainer

    say("Reading data and model ...")
    training, validation = together(read)
    model, tokenizer, length = together(load)
    trained_on, held_out = together(encode)
    trainer = together(build)
    name = settings.model.model_name_or_path or demo.MODEL_TITLE
    num_arms = len(trainer.layer_map)
    num_active = settings.slsam.num_active(num_arms)
    ranks = f"{args.world_size} rank{'s' if args.world_size > 1 else ''}"
    say(f"Model: {name}; {model.num_parameters():,} weights, {num_active} of {num_arms} layers per step, on {ranks}")
    tail = "" if held_out is None else f", {len(held_out):,} held out"
    say(f"Data: {training.source}; {len(trainer.train_dataset):,} samples to train on{tail}")
    return trainer


def read_samples(data: DataArguments) -> tuple[Samples, Samples | None]:
    """Rows for training and, where there are any, for validation.

    Raises:
        UsageError: Data that cannot be read, or without the columns to learn from.
    """
    validation: Dataset | None = None
    if data.is_demo:
        sources = ("functions and docstrings of this Python's standard library",) * 2
        training, validation = demo.build_datasets(_NUM_DEMO_VALIDATION)
    elif data.dataset_name is not None:
        sources = (f"--dataset_name {data.dataset_name}",) * 2
        training, validation = read_named(data.dataset_name, data.dataset_config_name)
    else:
        sources = (f"--train_file {' '.join(data.train_file)}",) * 2
        training = read_files("--train_file", data.train_file)
    if data.validation_file:
        sources = (sources[0], f"--validation_file {' '.join(data.validation_file)}")
        validation = read_files("--validation_file", data.validation_file)
    found = [
        Samples(rows, choose_columns(rows.column_names, data, source), source)
        for rows, source in zip((training, validation), sources, strict=True)
        if rows is not None
    ]
    return found[0], found[1] if validation is not None else None


def train(trainer: SLSAMTrainer, settings: Settings) -> None:
    """Train, save, and print what happened."""
    trainer.train(resume_from_checkpoint=settings.checkpoint)
    trainer.save_model()
    held_out = None
    if trainer.eval_dataset is not None:
        after = trainer.evaluate()["eval_loss"]
        # Measured at the start; a resumed run finds it in the history that its checkpoint brought.
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        held_out = (before, after)
    trainer.save_state()
    if trainer.is_world_process_zero():
        output_dir = trainer.args.output_dir
        print(
            summarize(
                json.loads(Path(output_dir, LAYERS_FILE).read_text(encoding="utf-8")),
                read_steps(output_dir),
                held_out=held_out,
                held_out_title=f"{len(trainer.eval_dataset or ())} samples",
                output_dir=output_dir,
            ),
            flush=True,
        )
