"""A run that is told to stop saves what it has, and goes on as if nothing had happened."""

import signal
import time
from pathlib import Path

import pytest

from slsam_ds.records.files import read_steps
from tests.command_line import SCRIPT, launch, make_flags, make_folder, signal_all, started
from tests.distributed.training import slow
from tests.step_records import without_times

NUM_STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("preemption"))


def wait_for_steps(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run does not step"
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", [slow("torchrun"), slow("deepspeed"), "forked alone"])
def test_a_stopped_run_goes_on_where_it_was(launcher: str, folder: Path) -> None:
    flags = make_flags(folder, f"stopped_{launcher}", max_steps=NUM_STEPS)
    with started(launcher, folder, SCRIPT, *flags) as process:
        wait_for_steps(folder / f"stopped_{launcher}" / "slsam_steps.jsonl", 3)
        signal_all(process, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=120)
    done = len(read_steps(folder / f"stopped_{launcher}"))
    assert 3 <= done < NUM_STEPS
    assert f"Stopped by a signal after step {done}" in stdout, stderr
    if launcher.startswith("forked"):  # launchers have exit codes of their own
        assert process.returncode == 75
    resumed = launch(launcher, folder, *flags, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    flags = make_flags(folder, f"whole_{launcher}", max_steps=NUM_STEPS)
    whole = launch(launcher, folder, *flags)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert without_times(read_steps(folder / f"stopped_{launcher}")) == without_times(
        read_steps(folder / f"whole_{launcher}")
    )
