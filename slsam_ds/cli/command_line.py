"""Entry of `launch/train.py` and `slsam train`: prepares the process, then runs the stages of a fine-tuning.

Imports the libraries that do the work only once they have been told how this process is launched and how much to say,
and, as they take seconds to import, only once there is work.
"""

import logging
import os
import warnings
from collections.abc import Sequence

import torch

from slsam_ds.cli.arguments import build_short_parser
from slsam_ds.cli.refusal import leave_ranks, run, together
from slsam_ds.cli.rendezvous import free_port
from slsam_ds.engines.deepspeed.operator_locks import warn_of_abandoned_locks
from slsam_ds.integrations.console import runs_on_cpu


def main(argv: Sequence[str]) -> None:
    """Fine-tune as `argv` says.

    Raises:
        SystemExit: Code 2 where something the user gave cannot be used: on every rank, before any training.
    """
    if "--help" in argv or "-h" in argv:
        build_short_parser().print_help()
        return
    complete_environment()
    if not any(argument.startswith(("--log_level", "--log-level")) for argument in argv):
        quieten()
    with_deepspeed = "ACCELERATE_USE_DEEPSPEED" in os.environ or any(flag.startswith("--deepspeed") for flag in argv)
    if with_deepspeed and os.environ["LOCAL_RANK"] == "0":
        warn_of_abandoned_locks()
    from slsam_ds.cli.finetune import build_trainer, train
    from slsam_ds.cli.settings import read_settings

    try:
        settings = together(lambda: read_settings(argv))
        trainer = build_trainer(settings)
        run(lambda: train(trainer, settings))
    finally:
        leave_ranks()


def complete_environment() -> None:
    """Fill in what the launcher left out, and say the rest the way all libraries understand."""
    # DeepSpeed's launcher has a name of its own for the number of local ranks. None at all: started by hand, as one.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    # `accelerate launch --cpu` says so in a way that would make Accelerate ignore DeepSpeed: say it as DeepSpeed does.
    if os.environ.pop("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes") or runs_on_cpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
        _limit_threads()


def quieten() -> None:
    """Turn down the libraries' talk. Errors stay, and so do our own warnings, which are printed."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    # Not even errors: `datasets` logs each, and raises it too, of which we make the one sentence to print.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    for library in (transformers, datasets):
        library.utils.logging.disable_progress_bar()
    for name in ("DeepSpeed", "accelerate", "torch.distributed"):
        # A filter, because DeepSpeed sets the level of its logger anew when it is imported.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed|transformers|accelerate|peft|datasets|gguf|tqdm)\b")


def _limit_threads() -> None:
    """Share the cores between the ranks of this machine, where nobody has said otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Two ranks that each start a thread per core spend their time waiting for each other.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"]))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
