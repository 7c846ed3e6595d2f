"""The command `slsam`, and `python -m slsam_ds`: hands the words behind a command's name to that command.

Imports nothing but the command that is asked for: `slsam --help` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import slsam_ds
from slsam_ds.sentences import did_you_mean, refuse


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        home: The module whose `main` takes its arguments, and returns its exit code or None.
        text: What it does.
    """

    home: str
    text: str


COMMANDS: Mapping[str, Command] = {
    "doctor": Command("slsam_ds.cli.doctor.command", "check this machine, a DeepSpeed configuration and a model"),
    "estimate": Command("slsam_ds.cli.estimate", "estimate what a step takes on each GPU, from a config.json"),
    "recipes": Command("slsam_ds.cli.recipes", "list the presets: published methods and our own"),
    "settings": Command("slsam_ds.cli.knobs", "list the settings, with their defaults"),
    "train": Command("slsam_ds.cli.command_line", "fine-tune a causal language model, as launch/train.py does"),
    "run": Command("slsam_ds.cli.run", "run an unchanged training script with SL-SAM in its Trainers"),
    "compare": Command("slsam_ds.cli.compare.command", "train with several methods, and compare them"),
    "report": Command("slsam_ds.report.command", "show what a run did in tables and figures"),
    "to_stock": Command("slsam_ds.engines.deepspeed.to_stock", "convert a DeepSpeed checkpoint for use without SL-SAM"),
}

_HELP = """usage: slsam COMMAND [ARGUMENT ...]

Sharpness-aware fine-tuning for LLMs, under DeepSpeed ZeRO and FSDP2.

commands:
{commands}

`slsam COMMAND --help` explains a command. `slsam --version` prints the version.

`slsam train` and `slsam run` start one process. To start several, use a launcher with the module of the same name:
  deepspeed --module slsam_ds.train --deepspeed zero2
  torchrun --nproc_per_node 2 -m slsam_ds.run --slsam preset=adamw_price -- train.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: that of the command that ran; after one sentence on stderr, 1 where a package is missing that it
        needs, and 2 where there is no such command.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        longest = max(map(len, COMMANDS))
        lines = (f"  {name:<{longest}}  {command.text}" for name, command in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="")
        return 0
    if name == "--version":
        print(f"slsam-ds {slsam_ds.__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"choose one of {', '.join(COMMANDS)}")
        return refuse(f"{name}: no such command; {hint}")
    try:
        home = importlib.import_module(COMMANDS[name].home)
    except ImportError as error:
        print(f"error: slsam {name}: {error}; run `slsam doctor` to see what is missing", file=sys.stderr)
        return 1
    try:
        code = home.main(arguments) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough of it, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush, and fail, once more
        return 0
    return code
