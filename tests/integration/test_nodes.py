"""Several nodes, each a launcher of its own on this machine: the same run as on one, and an end when one is lost."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deepspeed.launcher.runner import fetch_hostfile
from safetensors.torch import load_file

from slsam_ds.records.files import read_steps
from tests.command_line import NUM_STEPS, ROOT, SCRIPT, launch, make_environment, make_flags, make_folder
from tests.nodes import Node, nodes_started
from tests.ranks import free_port
from tests.step_records import without_times

KNOBS = ("--slsam", "active_layers=2", "rho=0.02")
TIMEOUT = 240
"""Seconds for a run; more than ten times what it takes on two free cores."""


def _deepspeed(folder: Path) -> list[list[str]]:
    """`deepspeed --no_ssh`, started on every node by hand."""
    port = str(free_port())
    (folder / "hostfile").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    options = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, "--hostfile", str(folder / "hostfile")]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *options]
    return [[*runner, "--node_rank", str(rank), str(SCRIPT)] for rank in range(2)]


def _torchrun(folder: Path) -> list[list[str]]:
    """The same `torchrun` line on every node."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", folder.name]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *meeting]
    return [[*command, str(SCRIPT)]] * 2


def _torchrun_by_rank(folder: Path) -> list[list[str]]:
    """`torchrun` with the nodes numbered by hand."""
    master = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *master]
    return [[*command, "--node_rank", str(rank), str(SCRIPT)] for rank in range(2)]


@pytest.fixture(autouse=True)
def _give_back_shared_memory() -> Iterator[None]:
    """What DeepSpeed keeps of ranks that were killed. What is in use belongs to a test that runs beside this one."""
    kept = set(Path("/dev/shm").glob("deepspeed_*"))
    yield
    left = set(Path("/dev/shm").glob("deepspeed_*")) - kept
    for process in psutil.process_iter() if left else ():
        with contextlib.suppress(psutil.Error):
            left -= {Path(mapped.path) for mapped in process.memory_maps()}
    for path in left:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("nodes"))


def _environment(folder: Path) -> dict[str, str]:
    return make_environment(folder)


def _run(commands: Sequence[Sequence[str]], folders: Sequence[Path], folder: Path, *flags: str) -> list[Node]:
    """Train with a launcher in each of `folders`, to a good end."""
    with nodes_started(
        [[*command, *flags] for command in commands], folders, _environment(folder), timeout=TIMEOUT
    ) as nodes:
        codes = [node.wait() for node in nodes]
    assert codes == [0] * len(nodes), "\n".join(node.output for node in nodes)
    return nodes


@pytest.fixture(scope="module")
def on_one_node(folder: Path) -> Path:
    """The output of the same training by two ranks of one node."""
    run = launch("forked", folder, *make_flags(folder, "one"), *KNOBS)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "one"


def _records(output: Path) -> list[dict[str, Any]]:
    return without_times(read_steps(output))


def _assert_same_run(output: Path, expected: Path) -> None:
    assert _records(output) == _records(expected)  # losses, layers, norms: all but the time
    assert len(_records(output)) == NUM_STEPS
    weights = load_file(output / "model.safetensors")
    for name, weight in load_file(expected / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(
    "launchers", [_deepspeed, *(pytest.param(each, marks=pytest.mark.slow) for each in (_torchrun, _torchrun_by_rank))]
)
def test_two_nodes_train_as_one(launchers: Callable[[Path], list[list[str]]], folder: Path, on_one_node: Path) -> None:
    """Without a shared output folder: rank 0 alone writes results, and what it says is said once."""
    name = launchers.__name__.strip("_")
    folders = [folder / name / str(rank) for rank in range(2)]
    nodes = _run(launchers(folder), folders, folder, *make_flags(folder, "out"), *KNOBS)
    for line in ("Model:", "Outputs:", "Layers active"):
        assert sum(node.output.count(line) for node in nodes) == 1
    written = [output for output in (each / "out" for each in folders) if any(output.iterdir())]
    assert len(written) == 1
    _assert_same_run(written[0], on_one_node)


# The stand-in for srun starts the command once per node, and keeps the options for the test to read.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> "$SRUN_OPTIONS"; shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
[[ $* == "show hostnames node[1-2]" ]] && printf '127.0.0.1\\nlocalhost\\n'
"""


def _slurm_environment(folder: Path, **more: str) -> dict[str, str]:
    """What Slurm sets in a job on two nodes, its commands replaced."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = _environment(folder)
    return environment | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{environment['PATH']}",
        "SRUN_OPTIONS": str(folder / "srun_options"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_GPUS_ON_NODE": "1",
        "MASTER_PORT": str(free_port()),
        **more,
    }


def _run_batch(folder: Path, *flags: str, **more: str) -> str:
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *flags]
    with nodes_started([command], [ROOT], _slurm_environment(folder, **more), timeout=TIMEOUT) as (job,):
        assert job.wait() == 0, job.output
    return job.output


@pytest.mark.slow
def test_batch_script_trains_on_all_nodes(folder: Path, on_one_node: Path) -> None:
    """With arguments that a shell would take apart or run."""
    output = folder / "a b; $(touch hole)"
    printed = _run_batch(folder, *make_flags(folder, str(output)), *KNOBS)
    assert printed.count("Outputs:") == 1
    assert not (ROOT / "hole").exists()
    assert (folder / "srun_options").read_text().split() == [
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=3",
        "--kill-on-bad-exit=1",
    ]
    _assert_same_run(output, on_one_node)


@pytest.mark.slow
def test_restarted_batch_job_resumes(folder: Path) -> None:
    flags = {"save_strategy": "steps", "save_steps": NUM_STEPS // 2, "lr_scheduler_type": "constant"}
    output = folder / "restarted"
    _run_batch(folder, *make_flags(folder, str(output), **flags | {"max_steps": NUM_STEPS // 2}), *KNOBS)
    before = read_steps(output)
    _run_batch(folder, *make_flags(folder, str(output), **flags), *KNOBS, SLURM_RESTART_COUNT="1")
    after = read_steps(output)
    assert [record["step"] for record in after] == list(range(1, NUM_STEPS + 1))
    assert after[: NUM_STEPS // 2] == before


def test_batch_script_fails_early(folder: Path) -> None:
    """Outside a job, or where Slurm cannot name the nodes: at once, before anything is started."""
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch")]
    for change in ({"SLURM_JOB_NODELIST": "elsewhere"}, {"SLURM_JOB_NODELIST": None}):
        environment = {**_slurm_environment(folder), "SRUN_OPTIONS": str(folder / "not_started"), **change}
        environment = {key: value for key, value in environment.items() if value is not None}
        run = subprocess.run(script, env=environment, capture_output=True, timeout=20)
        assert run.returncode != 0
        assert not (folder / "not_started").exists()


def test_example_hostfile_is_one() -> None:
    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"worker-0": 8, "worker-1": 8}


@contextlib.contextmanager
def _training(
    launchers: Callable[[Path], list[list[str]]], folders: Sequence[Path], folder: Path, *flags: str, **changes: Any
) -> Iterator[list[Node]]:
    """Two nodes in the middle of a run that would go on for hours."""
    endless = make_flags(folder, "out", max_steps=10**6, logging_steps=1, disable_tqdm=True, **changes)
    commands = [[*command, *endless, *flags] for command in launchers(folder)]
    with nodes_started(commands, folders, _environment(folder), timeout=TIMEOUT) as nodes:
        nodes[0].wait_for("'loss'")
        yield nodes


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("launchers", [_deepspeed, _torchrun_by_rank])
def test_killed_node_ends_the_other(
    launchers: Callable[[Path], list[list[str]]], lost: int, folder: Path, tmp_path: Path
) -> None:
    """At once, long before any deadline: its connections are closed."""
    with _training(launchers, [tmp_path / "0", tmp_path / "1"], folder) as nodes:
        nodes[lost].kill()
        other = nodes[1 - lost]
        assert other.wait() != 0
    assert "Connection" in other.output  # closed, or reset, by peer


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_silent_node_ends_the_other(engine: str, folder: Path, tmp_path: Path) -> None:
    """After `--ddp_timeout`, in whichever group a collective waits: the default of some is beyond this test's time."""
    folders = [tmp_path / "0", tmp_path / "1"]
    config = None if engine == "fsdp2" else ROOT / "ds_configs" / f"{engine}.json"
    flags = ["--fsdp"] if config is None else ["--deepspeed", str(config)]
    with _training(_torchrun_by_rank, folders, folder, *flags, deepspeed=None, ddp_timeout=30) as nodes:
        nodes[1].freeze()
        assert nodes[0].wait() != 0
    assert "Timed out waiting 30000ms" in nodes[0].output


@pytest.mark.slow
@pytest.mark.parametrize("present", [0, 1])
def test_missing_node_is_said(present: int, folder: Path, tmp_path: Path) -> None:
    command = [*_deepspeed(folder)[present], *make_flags(folder, "out", ddp_timeout=5)]
    with nodes_started([command], [tmp_path], _environment(folder), timeout=TIMEOUT) as (node,):
        assert node.wait() != 0
    assert node.output.count("error: no connection to the other ranks: ") == 1
    assert "Traceback" not in node.output
