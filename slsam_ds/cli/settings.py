"""Everything the command line and the DeepSpeed JSON say, checked as far as possible without model and data."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import DeepSpeedPlugin
from transformers import IntervalStrategy, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from slsam_ds.cli.adapters import given_lora_flags
from slsam_ds.cli.arguments import DEMO_DEFAULTS, DataArguments, ModelArguments, describe_unknown
from slsam_ds.cli.parser import build_parser
from slsam_ds.cli.refusal import UsageError, join_ranks, path_of, refusals
from slsam_ds.config import SLSAMConfig
from slsam_ds.engines.deepspeed.config import check_config, read_config
from slsam_ds.integrations.checkpoints import check_complete, last_complete_checkpoint
from slsam_ds.integrations.compatibility import checkpointing_flag
from slsam_ds.integrations.num_steps import check_steps_asked_for
from slsam_ds.integrations.support import describe_mismatches

_FINITE = ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "logging_steps", "save_steps")
_LAUNCHER_SECTION = "accelerate launch: its DeepSpeed section"
_EVAL_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
_JSON_FLAGS = (
    "accelerator_config", "fsdp_config", f"{checkpointing_flag()}_kwargs", "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to do.

    Attributes:
        model: Which model.
        data: Which data.
        slsam: The knobs: the JSON's block with `--slsam` laid over it.
        training: Everything else.
        checkpoint: Folder to resume from.
        measure: Count what steps send and hold.
    """

    model: ModelArguments
    data: DataArguments
    slsam: SLSAMConfig
    training: TrainingArguments
    checkpoint: str | None
    measure: bool = False


def read_settings(argv: Sequence[str]) -> Settings:
    """Parse the flags, with the demo's defaults where the user brings no data, and read the DeepSpeed JSON.

    Raises:
        UsageError: An unknown flag, a bad value or combination, or a JSON that cannot be used.
    """
    parser = build_parser()
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":  # its "no" is also what it says if nobody was asked
        parser.set_defaults(fp16=True, bf16=False)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(describe_unknown(parser, unknown[0]))
    section = _launcher_section(given.deepspeed)
    deepspeed = section if given.deepspeed is None else given.deepspeed
    _check_combinations(given, with_deepspeed=deepspeed is not None)
    slsam = _read_slsam(deepspeed, given.slsam)
    if _is_demo(given):
        parser.set_defaults(**_demo_defaults(argv))
    if given.fp16:
        parser.set_defaults(bf16=False)
    with (
        refusals(Exception, prefix="the training flags do not fit together: "),  # whatever their code runs into
        refusals(ValueError, ImportError, NotImplementedError, OSError),
    ):
        if given.use_cpu:
            join_ranks(backend=given.ddp_backend, timeout=given.ddp_timeout)
        model, data, ours, training = parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)[:4]
    _check_training(training)
    if training.hub_token is not None:  # the trainer writes its arguments, all of them, beside every checkpoint
        os.environ["HF_TOKEN"], training.hub_token = training.hub_token, None
    if data.streaming:
        # Else the first rank would read for all, and could not: it joins batches of different lengths.
        training.accelerator_config.dispatch_batches = False
    _make_output_dir(training.output_dir)
    return Settings(
        model=model,
        data=data,
        slsam=slsam,
        training=training,
        checkpoint=_find_checkpoint(training),
        measure=ours.measure,
    )


def _launcher_section(deepspeed: str | None) -> Mapping[str, Any] | None:
    """The DeepSpeed configuration that `accelerate launch` was given, as a JSON or as keys of its own.

    Args:
        deepspeed: `--deepspeed`, which goes without one.

    Returns:
        As `TrainingArguments` will make it again; None: there is none, or only the wish for the engine.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if deepspeed is not None:
        if os.environ.get("ACCELERATE_CONFIG_DS_FIELDS"):
            raise UsageError(f"--deepspeed {deepspeed}: accelerate launch has a DeepSpeed section already: give one")
        return None
    with refusals(ValueError, TypeError, KeyError, prefix=f"{_LAUNCHER_SECTION}: "):
        section: Mapping[str, Any] = DeepSpeedPlugin().deepspeed_config
    return section


def _is_demo(given: Any) -> bool:
    return not given.train_file and given.dataset_name is None


def _demo_defaults(argv: Sequence[str]) -> Mapping[str, Any]:
    asks_for_epochs = any(argument.replace("-", "_").startswith("__num_train_epochs") for argument in argv)
    # The demo's number of steps would win over the number of epochs that the user asked for.
    return {name: value for name, value in DEMO_DEFAULTS.items() if not (asks_for_epochs and name == "max_steps")}


def _check_combinations(given: Any, *, with_deepspeed: bool) -> None:
    if given.fp16 and not with_deepspeed:
        raise UsageError("--fp16: needs --deepspeed, which scales the loss; or use bf16 (the default)")
    if given.train_file and given.dataset_name is not None:
        raise UsageError("--train_file and --dataset_name exclude each other: give one")
    if given.validation_file and _is_demo(given):
        raise UsageError("--validation_file without training data: give --train_file or --dataset_name too")
    _check_streaming(given)
    for name, value in given_lora_flags(given).items():
        if given.peft != "lora":
            raise UsageError(f"--{name}: only for training adapters: add --peft lora, or leave the flag out")
        if name == "lora_r" and value < 1:
            raise UsageError(f"--lora_r {value}: choose a rank of at least 1")
    if with_deepspeed and given.fsdp:
        raise UsageError("--deepspeed and --fsdp exclude each other: give one")
    for name in (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "ddp_timeout",
    ):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name} {getattr(given, name)}: choose a number of at least 1")
    if not 0 <= given.seed < 2**32:  # numpy's range
        raise UsageError(f"--seed {given.seed}: choose a number from 0 to {2**32 - 1}")
    for name in _FINITE:
        if not 0 <= getattr(given, name) < math.inf:
            raise UsageError(f"--{name} {getattr(given, name)}: choose a finite number of at least 0")
    for name in _JSON_FLAGS:
        _check_json(f"--{name}", getattr(given, name), may_be_file=name.endswith("_config"))


def _check_json(flag: str, text: str | None, *, may_be_file: bool) -> None:
    """Refuse what is no JSON object, by the flag's name, which transformers would not say."""
    if text is None:
        return
    with refusals(ValueError, OSError, RecursionError, prefix=f"{flag} {text}: "):
        from_file = may_be_file and not text.startswith("{")
        values = json.loads(Path(text).read_text(encoding="utf-8") if from_file else text)
    if not isinstance(values, dict):
        raise UsageError(f"{flag} {text}: expected a JSON object, like {{...}}" + ", or a file of one" * may_be_file)


def _check_streaming(given: Any) -> None:
    if given.shuffle_buffer < 0:
        raise UsageError(f"--shuffle_buffer {given.shuffle_buffer}: choose a number of rows, or 0 for no shuffling")
    if given.streaming and _is_demo(given):
        raise UsageError("--streaming without data of your own: give --train_file or --dataset_name too")
    if given.streaming and given.max_steps < 1:
        raise UsageError("--streaming: the number of samples is not known in advance: give --max_steps too")
    if given.streaming and given.dataloader_num_workers > len(given.train_file) > 0:
        raise UsageError(
            f"--dataloader_num_workers {given.dataloader_num_workers}: with --streaming each file is read by one "
            f"worker: choose from 0 to {len(given.train_file)}"
        )


def _read_slsam(deepspeed: str | Mapping[str, Any] | None, assignments: Sequence[str]) -> SLSAMConfig:
    """Check the DeepSpeed JSON, and take the knobs from its `slsam` block and from the flags."""
    if deepspeed is None:
        with refusals(ValueError):
            return SLSAMConfig.from_assignments(assignments)
    if isinstance(deepspeed, str) and deepspeed.lstrip().startswith("{"):
        raise UsageError("--deepspeed: expected the path of a JSON file, not the JSON itself")
    with refusals(ValueError):
        config, block = read_config(deepspeed)
    name = f"--deepspeed {deepspeed}" if isinstance(deepspeed, str) else _LAUNCHER_SECTION
    with refusals(ValueError, prefix=f"{name}: "):
        check_config(config)
    with refusals(ValueError):
        if block is not None and not isinstance(block, Mapping):
            return SLSAMConfig.from_dict(block)  # says what a block must be
        return SLSAMConfig.from_assignments(assignments, base=block)


def _make_output_dir(folder: str) -> None:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell: nobody writes to a read-only file system
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot be written to ({error.strerror})") from error


def _check_training(training: TrainingArguments) -> None:
    options = f" --optim_args {training.optim_args}" if training.optim_args else ""
    with refusals(ValueError, ImportError, prefix=f"--optim {training.optim.value}{options}: "):
        Trainer.get_optimizer_cls_and_kwargs(training)
    with refusals(ValueError):
        check_steps_asked_for(training)
    if training.deepspeed:
        mismatches = describe_mismatches(training.hf_deepspeed_config)
        if mismatches:
            raise UsageError(f"--deepspeed {training.deepspeed}: contradicts the flags: {mismatches}")
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in _EVAL_METRICS:
        raise UsageError(
            f"--metric_for_best_model {training.metric_for_best_model}: no such metric; evaluation gives "
            + ", ".join(f"eval_{name}" for name in _EVAL_METRICS)
        )
    if training.save_strategy == SaveStrategy.BEST and training.eval_strategy == IntervalStrategy.NO:
        raise UsageError("--save_strategy best: nothing would be saved without evaluation: give --eval_strategy too")
    available = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in available:
            raise UsageError(f"--report_to {name}: not installed; there are: {', '.join(available) or 'none'}")


def _find_checkpoint(training: TrainingArguments) -> str | None:
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() == "true":
        last = last_complete_checkpoint(training.output_dir)
        if last is None:
            raise UsageError(f"--resume_from_checkpoint true: there is no checkpoint in {training.output_dir}")
        asked = last
    folder = path_of(f"--resume_from_checkpoint {asked}", asked)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UsageError(
            f"--resume_from_checkpoint {asked}: not a checkpoint of a Trainer (it holds no {TRAINER_STATE_NAME})"
        )
    with refusals(prefix="--resume_from_checkpoint "):
        num_steps = check_complete(folder)
    if 0 < training.max_steps <= num_steps:  # the trainer would take one step too many
        raise UsageError(
            f"--max_steps {training.max_steps}: {asked} was saved at step {num_steps}, nothing is left: choose more"
        )
    return str(folder)
