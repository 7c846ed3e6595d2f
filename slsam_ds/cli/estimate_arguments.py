"""The flags of `slsam estimate`, and the run that they and a DeepSpeed configuration describe."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from slsam_ds.cli.arguments import Formatter, Parser, describe_unknown
from slsam_ds.cli.refusal import UsageError, refusals
from slsam_ds.config import SLSAMConfig
from slsam_ds.estimate.sharding import RunSetup

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DESCRIPTION = """Estimate what a step of AdamW, of dense SAM and of SL-SAM takes on each GPU: FLOPs, memory and bytes
sent between GPUs. MODEL is a model of the transformers library. It is built from its configuration without weights,
so a laptop can estimate a model of any size. If MODEL is a hub id, its config.json is downloaded, and nothing else."""

_EPILOG = """
examples:
  slsam estimate --model path/to/model --zero 2 --world_size 8
  slsam estimate --model config.json --fsdp --world_size 16 --slsam active_layers=4 ascent_fraction=0.25
  slsam estimate --model config.json --deepspeed ds_configs/zero3.json --world_size 64 --json
"""


@dataclass
class RunArguments:
    """A run that does not go on yet."""

    _argument_group_name: ClassVar[str] = "the run"

    model: str | None = field(
        default=None,
        metadata={"metavar": "MODEL", "help": "Folder with a config.json, the path of a config.json, or a hub id."},
    )
    deepspeed: str | None = field(
        default=None,
        metadata={
            "metavar": "JSON",
            "help": "DeepSpeed configuration: a JSON file, or a name such as zero2. Stage, precision, offload, batch "
            "size and the slsam block are read from it. Other flags override it.",
        },
    )
    zero: int | None = field(default=None, metadata={"choices": (0, 1, 2, 3), "help": "ZeRO stage. Default: 2."})
    fsdp: bool = field(
        default=False,
        metadata={"metavar": "[BOOL]", "help": "FSDP2 instead of ZeRO. Each block is resharded after its forward."},
    )
    world_size: int | None = field(
        default=None,
        metadata={"metavar": "N", "help": "Number of ranks. Default: 1; in slsam doctor, one per accelerator."},
    )
    micro_batch_size: int | None = field(
        default=None, metadata={"metavar": "N", "help": "Samples per rank and micro-batch. Default: 1."}
    )
    sequence_length: int | None = field(
        default=None,
        metadata={"metavar": "TOKENS", "help": "Tokens per sample. Default: 1024, or the model's limit if lower."},
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"metavar": "N", "help": "Micro-batches per optimizer step. Default: 1."}
    )
    dtype: str | None = field(
        default=None,
        metadata={"choices": tuple(DTYPES), "help": "Precision of the forward pass. Default: bf16."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"metavar": "[BOOL]", "help": "Recompute activations in backward."}
    )
    offload_optimizer: bool = field(
        default=False,
        metadata={"metavar": "[BOOL]", "help": "Keep ZeRO's master weights and optimizer state on the CPU."},
    )
    peft: str = field(
        default="none", metadata={"choices": ("none", "lora"), "help": "lora: train only low-rank adapters."}
    )
    lora_r: int = field(default=16, metadata={"metavar": "R", "help": "Rank of the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"metavar": "NAME", "help": "Names of the modules to adapt, or all-linear."},
    )
    slsam: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "metavar": "KEY=VALUE",
            "help": "SL-SAM's settings, as for slsam train: --slsam active_layers=4 rho=0.02, or budget=1.0.",
        },
    )


@dataclass
class EstimateArguments(RunArguments):
    """What to estimate."""

    json: bool = field(
        default=False, metadata={"metavar": "[BOOL]", "help": "Print JSON with unrounded bytes and FLOPs."}
    )


def parse_flags(argv: Sequence[str]) -> Any:
    """The flags of `slsam estimate`, checked as far as possible without the model.

    Raises:
        UsageError: An unknown flag, a bad value or combination.
    """
    given = parse_run(
        argv,
        EstimateArguments,
        prog="slsam estimate",
        usage="slsam estimate --model MODEL [--zero STAGE | --fsdp | --deepspeed JSON] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    if given.model is None:
        raise UsageError("--model: give a folder with a config.json, such a file, or a hub id")
    return given


def parse_run(argv: Sequence[str], arguments: type[RunArguments], **texts: str) -> Any:
    """The flags of a command that looks at a run, checked likewise.

    Args:
        argv: The command line.
        arguments: The flags.
        **texts: Of the parser; the epilog has examples.

    Raises:
        UsageError: An unknown flag, a bad value or combination.
    """
    parser = Parser([arguments], formatter_class=_WithExamples, allow_abbrev=False, **texts)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(describe_unknown(parser, unknown[0]))
    if given.fsdp and (given.zero is not None or given.deepspeed is not None):
        raise UsageError("--fsdp excludes --zero and --deepspeed: give one")
    if given.fsdp and given.offload_optimizer:
        raise UsageError("--offload_optimizer: not supported with --fsdp; use --slsam offload_state=true")
    for name in ("world_size", "micro_batch_size", "gradient_accumulation_steps", "lora_r"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UsageError(f"--{name} {getattr(given, name)}: choose a number of at least 1")
    return given


class _WithExamples(Formatter):
    """Examples line by line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("\nexamples:") else super()._fill_text(text, width, indent)


def read_setup(given: Any) -> tuple[RunSetup, SLSAMConfig, Mapping[str, Any]]:
    """The run as flags and DeepSpeed's configuration describe it, the knobs, and DeepSpeed's section on ZeRO.

    Raises:
        UsageError: A configuration that cannot be used, or a combination that no engine supports.
    """
    deepspeed: dict[str, Any] = {}
    block: Any = None
    if given.deepspeed is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing will run, and no accelerator need be looked for
        from slsam_ds.engines.deepspeed.config import check_config, read_config

        with refusals(ValueError):
            deepspeed, block = read_config(given.deepspeed)
        with refusals(ValueError, prefix=f"--deepspeed {given.deepspeed}: "):
            check_config(deepspeed)
    with refusals(ValueError):
        config = SLSAMConfig.from_assignments(given.slsam, base=block) if isinstance(block, Mapping | None) else None
        config = config or SLSAMConfig.from_dict(block)  # says what a block must be
    section: dict[str, Any] = deepspeed.get("zero_optimization", {})
    stage = given.zero if given.zero is not None else section.get("stage", 0) if given.deepspeed else 2
    with refusals(ValueError, TypeError, prefix=f"--deepspeed {given.deepspeed}: a size that is no number: "):
        given.micro_batch_size = given.micro_batch_size or _number(deepspeed, "train_micro_batch_size_per_gpu")
        limits = (_number(section, name, 10**9) for name in ("stage3_max_reuse_distance", "stage3_max_live_parameters"))
        setup = RunSetup(
            engine="fsdp2" if given.fsdp else f"zero{stage}",  # type: ignore[arg-type]
            world_size=given.world_size or 1,
            num_micro_batches=given.gradient_accumulation_steps or _number(deepspeed, "gradient_accumulation_steps"),
            precision=given.dtype or _precision(deepspeed, given.deepspeed is not None),  # type: ignore[arg-type]
            offload_optimizer=given.offload_optimizer or _offloads(section, "offload_optimizer"),
            offload_parameters=stage == 3 and _offloads(section, "offload_param"),
            reuse_distance=min(limits),
        )
    _check(setup, config)
    return setup, config, section


def _check(setup: RunSetup, config: SLSAMConfig) -> None:
    """Refuse what no engine does."""
    if setup.precision == "fp16" and setup.engine in ("zero0", "fsdp2"):
        raise UsageError("fp16: needs ZeRO stage 1, 2 or 3; or use bf16 or fp32")
    if setup.offload_optimizer and setup.engine == "zero0":
        raise UsageError("--offload_optimizer: needs ZeRO stage 1, 2 or 3; or use --slsam offload_state=true")
    if config.ascent_scope != "global" and not setup.whole_weights:
        raise UsageError(
            f'slsam.ascent_scope="{config.ascent_scope}": needs whole weights on every rank; where they are sharded '
            '(ZeRO-3, FSDP), use "global"'
        )


def _number(section: Mapping[str, Any], name: str, default: int = 1) -> int:
    value = section.get(name, "auto")
    return default if value == "auto" else int(value)


def _precision(deepspeed: Mapping[str, Any], has_file: bool) -> str:
    for name in ("fp16", "bf16"):
        if deepspeed.get(name, {}).get("enabled") is True:
            return name
    decided = has_file and deepspeed.get("bf16", {}).get("enabled", False) != "auto"
    return "fp32" if decided else "bf16"


def _offloads(section: Mapping[str, Any], name: str) -> bool:
    return (section.get(name) or {}).get("device", "none") == "cpu"
