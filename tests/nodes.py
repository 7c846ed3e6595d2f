"""Launchers side by side on one machine, each in the place of a node: what they print and how they end."""

import contextlib
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil


class Node:
    """One launcher and everything that it started.

    Args:
        command: Starts the launcher.
        folder: Where it runs; created where missing.
        environment: Of the launcher.
        deadline: When waiting for it becomes a failure. Seconds of `time.monotonic`.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str], deadline: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = ""
        """What was printed, as far as somebody has waited for it."""
        self._deadline = deadline
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._launcher = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, text: str) -> None:
        """Until a line with `text` is printed."""
        line: str | None = ""
        while line is not None:
            line = self._next_line()
            if line is not None and text in line:
                return
        raise AssertionError(f"a node ended without {text!r}:\n{self.output}")

    def wait(self) -> int:
        """Until the launcher has ended, and all that it started.

        Returns:
            Its exit code.
        """
        while self._next_line() is not None:  # the pipe is closed when its last holder has ended
            pass
        return self._launcher.wait(timeout=10)

    def freeze(self) -> None:
        """Fall silent, as behind a broken network: nothing runs, connections stay."""
        for process in self._processes():
            process.suspend()

    def kill(self) -> None:
        """End at once, as in a power cut."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._launcher.wait(timeout=10)

    def _processes(self) -> list[psutil.Process]:
        if self._launcher.poll() is not None:
            return []
        launcher = psutil.Process(self._launcher.pid)
        return [launcher, *launcher.children(recursive=True)]  # by parentage: torchrun's ranks have their own session

    def _read(self) -> None:
        assert self._launcher.stdout is not None
        for line in self._launcher.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _next_line(self) -> str | None:
        try:
            line = self._lines.get(timeout=max(0.0, self._deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"a node did not end in time; it printed:\n{self.output}") from None
        self.output += line or ""
        return line


@contextlib.contextmanager
def nodes_started(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], environment: Mapping[str, str], *, timeout: float
) -> Iterator[list[Node]]:
    """One launcher per command, each in its folder; whatever is left of them is killed in the end.

    Args:
        commands: Start the launchers.
        folders: Where they run.
        environment: Of all of them.
        timeout: Seconds for everything that is waited for.
    """
    deadline = time.monotonic() + timeout
    nodes: list[Node] = []
    try:
        for command, folder in zip(commands, folders, strict=True):
            nodes.append(Node(command, folder, environment, deadline))
        yield nodes
    finally:
        for node in nodes:
            node.kill()
