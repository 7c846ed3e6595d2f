"""`launch/train.py` as people start it: real launchers, a tiny model, files of samples."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.forked import ForkedScript
from tests.models import tiny_llama
from tests.ranks import free_port, free_shared_memory
from tests.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "train.py"
NUM_STEPS = 6
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Of every run: ranks with a thread per core wait for each other's, and sums in another order are other sums."""


def make_folder(folder: Path) -> Path:
    """Put a model, its tokenizer, and files of samples into a folder."""
    tiny_llama(tied=True).save_pretrained(folder / "model")
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    generator = random.Random(0)
    for name, count in (("train", 48), ("validation", 10)):
        words = ["".join(generator.choices("abcdef", k=8)) for _ in range(count)]
        rows = [{"question": f"echo {word}", "answer": word} for word in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def launch(launcher: str, folder: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `launch/train.py` in `folder` until it ends; see `launch_script`."""
    return launch_script(launcher, folder, SCRIPT, *flags, **options)


def launch_script(
    launcher: str,
    folder: Path,
    script: str | Path,
    *flags: str,
    timeout: float = 150,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run any script in `folder` until it ends; see `started`."""
    with started(launcher, folder, script, *flags, variables=variables) as process:
        stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, stdout, stderr)


@contextlib.contextmanager
def started(
    launcher: str, folder: Path, script: str | Path, *flags: str, variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str] | ForkedScript]:
    """Within, a run of the script is under way; what of it is still there at the end is killed.

    Args:
        launcher: "deepspeed", "torchrun", "accelerate with a file" (accelerate.yaml in the folder), "accelerate" and
            "python" start cold, as people start them: on two ranks, but for the last two. "forked" and "forked alone"
            start two ranks and one without any, in a tenth of the time.
        folder: Where it runs.
        script: What runs.
        *flags: Its arguments.
        variables: Added to its environment.
    """
    environment = make_environment(folder) | dict(variables or {})
    if launcher.startswith("forked"):
        num_ranks = 1 if launcher == "forked alone" else 2
        with tempfile.TemporaryDirectory() as output:
            forked = ForkedScript(folder / script, flags, folder, environment, num_ranks, output=Path(output))
            try:
                yield forked
            finally:
                forked.kill()
        return
    port = str(free_port())
    accelerate = ["accelerate.commands.launch", "--main_process_port", port]
    commands = {
        "deepspeed": ["deepspeed.launcher.runner", "--master_port", port, "--num_accelerators", "2"],
        "torchrun": ["torch.distributed.run", "--master_port", port, "--nproc_per_node", "2"],
        "accelerate": [*accelerate, "--cpu", "--num_processes", "1"],
        "accelerate with a file": [*accelerate, "--config_file", "accelerate.yaml"],
    }
    command = [sys.executable, "-m", *commands[launcher]] if launcher != "python" else [sys.executable]
    process = subprocess.Popen(
        [*command, str(script), *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)
        free_shared_memory(port)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The process, which leads a session of its own, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def signal_all(process: subprocess.Popen[str] | ForkedScript, number: int) -> None:
    """Send a signal to the launcher and to its ranks: the deepspeed launcher alone would end, and tell nobody."""
    if isinstance(process, ForkedScript):
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)


def make_environment(folder: Path) -> dict[str, str]:
    """Of a launcher on the CPU: nothing of a launcher above, no hub, the cache in `folder`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "DS_ACCELERATOR": "cpu",
        **ONE_THREAD,
    }


def make_flags(folder: Path, output_dir: str, **changes: Any) -> list[str]:
    """A run of `NUM_STEPS` steps on the folder's model and samples, with changes; None takes a flag away."""
    flags = {
        "deepspeed": ROOT / "ds_configs" / "zero2.json",
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.jsonl",
        "prompt_column": "question",
        "response_column": "answer",
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "output_dir": output_dir,
    } | changes
    return [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]
