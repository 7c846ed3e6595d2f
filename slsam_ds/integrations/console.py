"""What is printed, and by whom."""

import os
import sys

import torch


def one_line(error: BaseException) -> str:
    """The first line of the error's message (all lines, where that one only introduces them); else its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    introduces = lines[0].rstrip().endswith(":") or (len(lines) > 1 and lines[1].startswith("- "))
    return " ".join(" ".join(lines if introduces else lines[:1]).split())


def say(text: str = "") -> None:
    """Print on the first rank only."""
    from accelerate import PartialState

    if PartialState(cpu=runs_on_cpu()).is_main_process:
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning of ours, on the first rank only. Not through `logging`, whose level the run turns down."""
    from accelerate import PartialState

    if PartialState(cpu=runs_on_cpu()).is_main_process:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def runs_on_cpu() -> bool:
    """Whether ranks compute, and talk, on the CPU.

    Accelerate has to be told: on a machine without accelerator it would otherwise take every rank for the only one.
    """
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available()
