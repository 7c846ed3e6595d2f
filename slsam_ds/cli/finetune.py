"""The two halves of a fine-tuning run: build everything, then train, save and report."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase

from slsam_ds.cli import demo
from slsam_ds.cli.arguments import DataArguments
from slsam_ds.cli.chat import use_template
from slsam_ds.cli.data import Columns, Encoder, choose_columns
from slsam_ds.cli.labels import IGNORED
from slsam_ds.cli.metering import MeteredTrainer
from slsam_ds.cli.models import choose_max_length, load_model
from slsam_ds.cli.packing import PackedCollator
from slsam_ds.cli.preemption import EXIT_CODE, stopping_on_signal
from slsam_ds.cli.probes import ModelCheck
from slsam_ds.cli.refusal import UsageError, refusals, together
from slsam_ds.cli.rows import Rows, read_files, read_named
from slsam_ds.cli.samples import StreamedSamples, pack_all, tokenize
from slsam_ds.cli.settings import Settings
from slsam_ds.cli.summary import summarize
from slsam_ds.integrations.console import say
from slsam_ds.integrations.huggingface import SLSAMTrainer
from slsam_ds.records.files import LAYERS_FILE, read_steps

_NUM_DEMO_VALIDATION = 64


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows, and which of their columns to learn from."""

    rows: Rows
    columns: Columns

    @classmethod
    def found(cls, rows: Rows, data: DataArguments) -> "Samples":
        """The rows, and the columns that the flags name or that are usual."""
        return cls(rows, choose_columns(rows.column_names, data, rows.source))

    def encoder(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoder:
        """What makes samples of the rows."""
        return Encoder(tokenizer, self.columns, max_length, self.rows.source)


def build_trainer(settings: Settings) -> SLSAMTrainer:
    """Load data and model and put them into a trainer.

    In stages that all ranks end together: one that failed must not leave the others in the next stage's collectives.

    Raises:
        SystemExit: Something of it cannot be used.
    """
    args, data = settings.training, settings.data

    def read() -> tuple[Samples, Samples | None]:
        with args.main_process_first():  # the node's first rank fills the cache of `datasets`, the others read it
            return read_samples(data)

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
        # DeepSpeed keeps float32 masters of 16-bit weights; FSDP2 and autocast cast float32 weights themselves.
        low_precision = torch.float16 if args.fp16 else torch.bfloat16
        dtype = low_precision if args.deepspeed_plugin and (args.bf16 or args.fp16) else torch.float32
        model, tokenizer = load_model(settings.model, dtype)
        use_template(tokenizer, data.chat_template)
        return model, tokenizer, choose_max_length(data.max_length, model)

    def encode() -> tuple[Dataset | StreamedSamples, Dataset | None]:
        encoder = training.encoder(tokenizer, length)
        with args.main_process_first():
            # Held-out samples are not packed: their loss is that of a run without packing.
            held_out = validation and tokenize(validation.rows, validation.encoder(tokenizer, length))
            if data.streaming:
                options = {"shuffle_buffer": data.shuffle_buffer, "seed": args.seed, "packed": data.packing}
                return StreamedSamples(training.rows, encoder, **options), held_out
            samples = tokenize(training.rows, encoder)
            return pack_all(samples, length) if data.packing else samples, held_out

    def build() -> SLSAMTrainer:
        args.eval_on_start = held_out is not None
        if held_out is None and args.eval_strategy != IntervalStrategy.NO:
            raise UsageError(
                f"--eval_strategy {args.eval_strategy.value}: there is nothing to evaluate on: give --validation_file, "
                "or a data set with a split validation"
            )
        padding = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
        with refusals(ValueError, OSError):  # the second: --push_to_hub makes its repository now
            trainer = (MeteredTrainer if settings.measure else SLSAMTrainer)(
                model=model,
                args=args,
                slsam=settings.slsam,
                train_dataset=trained_on,
                eval_dataset=held_out,
                processing_class=tokenizer,
                data_collator=PackedCollator(tokenizer.pad_token_id) if data.packing else padding,
            )
            trainer.add_callback(ModelCheck(trainer, packed=data.packing))
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
    chosen = f"{settings.slsam.num_active(num_arms)} of {num_arms} layers per step"
    if settings.slsam.budget is not None:
        chosen = f"{num_arms} layers, steps at {settings.slsam.budget:g} of AdamW's price"
    ranks = f"{args.world_size} rank{'s' if args.world_size > 1 else ''}"
    say(f"Model: {name}; {model.num_parameters():,} weights, {chosen}, on {ranks}")
    say(f"Data: {training.rows.source}; {_describe(trained_on, held_out, packed=data.packing)}")
    return trainer


def read_samples(data: DataArguments) -> tuple[Samples, Samples | None]:
    """Rows for training and, where there are any, for validation.

    Raises:
        UsageError: Data that cannot be read, or without the columns to learn from.
    """
    validation: Rows | None = None
    if data.is_demo:
        source = "functions and docstrings of this Python's standard library"
        training, validation = (Rows.of_table(source, table) for table in demo.build_datasets(_NUM_DEMO_VALIDATION))
    elif data.dataset_name is not None:
        training, validation = read_named(data.dataset_name, data.dataset_config_name, streaming=data.streaming)
    else:
        training = read_files("--train_file", data.train_file)
    if data.validation_file:
        validation = read_files("--validation_file", data.validation_file)
    return Samples.found(training, data), None if validation is None else Samples.found(validation, data)


def _describe(training: Dataset | StreamedSamples, held_out: Dataset | None, *, packed: bool) -> str:
    what = "rows of packed samples" if packed else "samples"
    trained_on = f"{len(training):,} {what} to train on" if isinstance(training, Dataset) else f"{what}, as they come"
    return trained_on if held_out is None else f"{trained_on}, {len(held_out):,} samples held out"


def train(trainer: SLSAMTrainer, settings: Settings) -> None:
    """Train, save, and print what happened.

    Raises:
        SystemExit: Stopped by a signal, with a checkpoint saved.
    """
    with stopping_on_signal(trainer.request_stop):
        trainer.train(resume_from_checkpoint=settings.checkpoint)
    if trainer.was_stopped:
        say(f"Stopped by a signal after step {trainer.state.global_step}; go on with --resume_from_checkpoint true")
        raise SystemExit(EXIT_CODE)
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
