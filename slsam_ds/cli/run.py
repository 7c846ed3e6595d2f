"""`slsam run`, also `python -m slsam_ds.run`: a training script as it is, with every Trainer in it an SL-SAM one.

The script finds the process as `python script.py` would have left it. So nothing is imported before it that reads the
environment when it is imported, as transformers and accelerate do: many a script sets `HF_HOME` in its first lines.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsam_ds.config import SLSAMConfig
from slsam_ds.integrations.interception import convert_trainers

ENVIRONMENT = "SLSAM_CONFIG"

_DESCRIPTION = """\
Run an unchanged training script, with SL-SAM in every Trainer that it makes: transformers.Trainer, Seq2SeqTrainer,
TRL's SFTTrainer and DPOTrainer, and classes that the script derives from them."""

_EPILOG = f"""\
examples:
  slsam run --slsam preset=adamw_price -- train.py --learning_rate 1e-4
  slsam run --slsam rho=0.02 active_layers=4 -m trl.scripts.sft --model_name_or_path ...
  deepspeed --module slsam_ds.run --slsam preset=adamw_price -- train.py --deepspeed zero2.json
  torchrun --nproc_per_node 2 -m slsam_ds.run -- train.py
  accelerate launch --num_processes 2 -m slsam_ds.run -- train.py

Settings given by --slsam override those in the environment variable {ENVIRONMENT} (a JSON object, or the path of a
file with one). Without {ENVIRONMENT} they override the "slsam" block of the DeepSpeed JSON that the script gives its
Trainer.

When training starts, a line on stderr says that SL-SAM is on, with its settings. Trainers that SL-SAM does not
support, such as those that generate their data, raise a ValueError. The exit code is 2 if the script makes no
Trainer."""

_NO_TRAINER = (
    "made no Trainer in this process, so nothing was trained with SL-SAM. In a loop of your own, use slsam_ds.SLSAM, "
    "slsam_ds.initialize (DeepSpeed) or slsam_ds.integrations.accelerate.prepare; if the script starts other "
    "processes that do the training, let their launcher start `-m slsam_ds.run`"
)


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and with which knobs.

    Attributes:
        name: Of a script or a module.
        is_module: Which of the two.
        arguments: The script's or module's own.
        assignments: `--slsam`'s.
        block: What the environment gives; None: nothing.
    """

    name: str
    is_module: bool
    arguments: Sequence[str]
    assignments: Sequence[str]
    block: Mapping[str, Any] | None

    def choose(self, json_block: Mapping[str, Any] | None = None) -> SLSAMConfig:
        """The knobs of a trainer whose DeepSpeed JSON has this `slsam` block.

        Raises:
            ValueError: Bad knobs.
        """
        return SLSAMConfig.from_assignments(self.assignments, base=json_block if self.block is None else self.block)


def main(argv: Sequence[str]) -> None:
    """Run what `argv` names, as `python` would.

    Raises:
        SystemExit: Code 2 on a usage error, or where the script ended well without having made a Trainer; else the
            script's own.
    """
    command = read_command(argv, os.environ)
    made = convert_trainers(command.choose)
    try:
        _run(command)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    if not made:
        print(f"error: {command.name}: {_NO_TRAINER}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    if not any(trainer_class.num_trained for trainer_class in made):
        print("SL-SAM: no Trainer was trained", file=sys.stderr)
    from slsam_ds.cli.refusal import leave_ranks

    leave_ranks()


def read_command(argv: Sequence[str], environment: Mapping[str, str]) -> Command:
    """Parse our own flags, which stand before the script.

    Raises:
        SystemExit: Code 2, after a sentence: they cannot be used. Code 0: they ask for help.
    """
    parser = _make_parser()
    given = parser.parse_args(argv)
    words = given.command
    if words[0] == "--":  # which Python 3.13 takes away
        words = words[1:]
    is_module = given.module or words[:1] == ["-m"]
    if words[:1] == ["-m"]:
        words = words[1:]
    if not words:
        parser.error("nothing to run: give a script, or -m and a module")
    if not is_module and not Path(words[0]).exists():
        parser.error(f"{words[0]}: no such script; to run a module, give -m before it")
    try:
        block = _read_block(environment.get(ENVIRONMENT))
        command = Command(words[0], is_module, [*given.local_rank, *words[1:]], given.slsam, block)
        command.choose()
    except ValueError as error:
        parser.error(str(error))
    return command


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slsam run",
        usage="%(prog)s [--slsam KEY=VALUE [KEY=VALUE ...]] (-- SCRIPT | -m MODULE) [ARGUMENT ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--slsam",
        action="extend",
        nargs="+",
        type=_assignment,
        default=[],
        metavar="KEY=VALUE",
        help="SL-SAM's settings, such as preset=NAME or rho=0.02; end them with -- or -m",
    )
    parser.add_argument("-m", "--module", action="store_true", help="run SCRIPT as a module, as python -m does")
    # The deepspeed launcher puts it before our own flags; it is the script's.
    parser.add_argument("--local_rank", "--local-rank", action=_AsWritten, default=[], help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.PARSER, metavar="SCRIPT", help="script or module, and its arguments")
    return parser


def _assignment(text: str) -> str:
    """One of `--slsam`'s words, which `SLSAMConfig` reads.

    Raises:
        argparse.ArgumentTypeError: It sets nothing: most often it is the script.
    """
    if "=" in text:
        return text
    if text.endswith(".py"):
        raise argparse.ArgumentTypeError(f"{text}: put -- before the script, as in --slsam rho=0.02 -- {text}")
    raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE, as in --slsam preset=adamw_price rho=0.02")


class _AsWritten(argparse.Action):
    """Keeps a flag with its value, to hand it on."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [f"{option_string}={values}"])


def _read_block(text: str | None) -> Mapping[str, Any] | None:
    """The knobs that the environment gives.

    Raises:
        ValueError: They cannot be read.
    """
    if text is None:
        return None
    try:
        block = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{ENVIRONMENT}={text}: expected a JSON object, or a file with one ({error})") from None
    if not isinstance(block, Mapping):
        raise ValueError(f"{ENVIRONMENT}={text}: expected a JSON object, like {{...}}")
    return block


def _run(command: Command) -> None:
    """Run a script or module as `python` does."""
    sys.argv = [command.name, *command.arguments]
    if command.is_module:
        if not sys.flags.safe_path:
            sys.path[0] = os.getcwd()  # where `slsam` stands, until now
        runpy.run_module(command.name, run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(command.name)
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(path)
    runpy.run_path(path, run_name="__main__")
