"""A script on ranks that start warm: forked with everything imported, where a launcher is not what is tested."""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ranks import FORK_SERVER, free_port, free_shared_memory


class ForkedScript:
    """A script under way on some ranks of this machine; told of as `subprocess.Popen` tells of a launcher.

    Args:
        script: What `python` would run.
        flags: Its arguments.
        folder: Where it runs.
        environment: Of all ranks; the variables that a launcher sets are added.
        num_ranks: 1: as started by hand, without a launcher.
        output: Folder for what is printed.
    """

    def __init__(
        self,
        script: Path,
        flags: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        num_ranks: int,
        output: Path,
    ) -> None:
        self.args = ["forked", str(script), *flags]
        self._printed = output / "stdout", output / "stderr"
        self._port = port = str(free_port())
        self._ranks = []
        for rank in range(num_ranks):
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(num_ranks)}
            meeting |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            variables = {**environment, **(meeting if num_ranks > 1 else {})}
            process = FORK_SERVER.Process(
                target=_run, args=(str(script), list(flags), str(folder), variables, *map(str, self._printed))
            )
            process.start()
            self._ranks.append(process)

    @property
    def returncode(self) -> int | None:
        """0 where all ranks ended well; else what the first one that did not returned."""
        codes = [process.exitcode for process in self._ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for all ranks.

        Returns:
            What they printed on stdout and on stderr.

        Raises:
            subprocess.TimeoutExpired: Some have not ended by then. Seconds.
        """
        deadline = time.monotonic() + timeout
        for process in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        stdout, stderr = (path.read_text() for path in self._printed)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout, stdout, stderr)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """To every rank, as a batch system does."""
        for process in self._ranks:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Whatever is left of it."""
        for process in self._ranks:
            process.kill()
            process.join()
        free_shared_memory(self._port)


def _run(
    script: str, flags: Sequence[str], folder: str, variables: Mapping[str, str], stdout: str, stderr: str
) -> None:
    """On a rank: what `python` does before and while it runs a script."""
    import datasets
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which multiprocessing's fork server ignores
    os.environ.clear()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])  # read when it was imported
    os.chdir(folder)
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
