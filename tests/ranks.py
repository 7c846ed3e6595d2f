"""Run a function on N ranks, with a time limit and the failing rank's traceback."""

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

# Importing DeepSpeed and transformers takes seconds: a fork server does it once and every rank starts from there.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.preloaded"])


DEVICE = os.environ.get("SLSAM_TEST_DEVICE", "cpu")
"""Where tests of several ranks train: "cpu", one thread for each rank, over gloo; "cuda", a GPU for each, over NCCL."""


class RankFailedError(AssertionError):
    """A rank raised or did not finish."""


def run_on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240, device: str = DEVICE
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh process group.

    Args:
        world_size: Number of processes.
        function: Importable by name; runs with the process group up.
        *args: Picklable.
        timeout: Seconds for all ranks together.
        device: See `DEVICE`.

    Returns:
        What each rank returned, in rank order. Only what pickles.

    Raises:
        RankFailedError: With the traceback of the rank that failed first, or the ranks that hung.
    """
    if device != "cpu" and num_devices(device) < world_size:
        pytest.skip(f"needs {world_size} devices of {device}, this machine has {num_devices(device)}")
    # CUDA cannot be used in what was forked from a process that has looked at it.
    context = FORK_SERVER if device == "cpu" else multiprocessing.get_context("spawn")
    port = str(free_port())  # nobody meets there, but DeepSpeed's shared memory is named after it
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process: Any = context.Process(
                target=_enter, args=(sender, rank, world_size, folder, port, device, function, args), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
            free_shared_memory(port)


def num_devices(device: str) -> int:
    """How many of them this machine has."""
    import torch

    return int(torch.get_device_module(device).device_count())


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_shared_memory(port: str) -> None:
    """What DeepSpeed's collectives left behind of a run that met at this port: it never does so itself."""
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        path.unlink()


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailedError(f"ranks {silent} did not finish within {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankFailedError(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailedError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _enter(
    sender: Any,
    rank: int,
    world_size: int,
    folder: str,
    port: str,
    device: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR=device)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if device == "cpu":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # else Accelerate gives each rank a thread per core, and they spin
    else:
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    try:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # Pickled here: the pipe's own pickling would share tensors through a process that is about to end.
    sender.send_bytes(pickle.dumps(answer))
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # skips the atexit work of libraries, which waits for nothing we need
