"""The parser of all flags: ours, and those of `transformers.TrainingArguments`, whose import takes five seconds."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from transformers import HfArgumentParser, TrainingArguments

from slsam_ds.cli.arguments import DEFAULTS, TRAINING_TITLE, new_parser
from slsam_ds.engines.named_configs import Kind, find_config
from slsam_ds.integrations.console import runs_on_cpu


@dataclass
class TrainingFlags(TrainingArguments):
    """`TrainingArguments`, in a group of their own."""

    _argument_group_name: ClassVar[str] = TRAINING_TITLE


def build_parser() -> HfArgumentParser:
    """The parser of the command line; it raises `UsageError` where argparse would print and exit."""
    parser = new_parser(TrainingFlags)
    parser.set_defaults(use_cpu=runs_on_cpu(), **DEFAULTS)
    kinds: dict[str, Kind] = {"deepspeed": "zero", "fsdp_config": "fsdp"}
    for action in parser._actions:
        if action.dest in kinds:
            action.type = functools.partial(_config_path, kind=kinds[action.dest])
    return parser


def _config_path(text: str, kind: Kind) -> str:
    """What transformers will open: it knows no names of configurations."""
    return str(find_config(text, kind))
