"""Runs the blocks of a page in order, and compares what they print with what the page shows."""

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.command_line import ROOT, kill_all, make_environment
from tests.docs.blocks import Block, PageError, outputs

_LINKED = ("launch", "ds_configs", "Makefile", "pyproject.toml", "constraints.txt")
"""What commands that are given in a clone refer to. What they write goes to the folder all the same."""

_TAIL = 6000
_PYTHON = """\
import json, os, sys
done = os.fdopen(int(sys.argv.pop()), "w")
namespace = {"__name__": "__main__"}
for line in sys.stdin:
    source, name = json.loads(line)
    exec(compile(source, name, "exec"), namespace)
    sys.stdout.flush()
    sys.stderr.flush()
    print(file=done, flush=True)
"""
"""Runs the Python blocks of a page as one program, which waits between them for blocks of other languages."""


def run_blocks(blocks: list[Block], folder: Path) -> None:
    """Run them in a folder, with the repository's own folders in it.

    Raises:
        PageError: A block fails, or prints something else than the page shows.
    """
    for name in _LINKED:
        (folder / name).symlink_to(ROOT / name)
    shown = outputs(blocks)
    with _PythonProgram(folder) as program:
        for number, block in enumerate(blocks):
            if "setup" in block.options and "skip" not in block.options:
                path = ROOT / block.options["setup"]
                program.run(path.read_text(encoding="utf-8"), str(path), block.place)
            if block.file is not None and "skip" not in block.options:
                target = folder / block.file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text, encoding="utf-8")
            elif block.is_run:
                _run(block, folder, program, shown.get(number))


def _run(block: Block, folder: Path, program: "_PythonProgram", shown: str | None) -> None:
    if block.language == "python":
        # With empty lines above, a traceback names the lines of the page.
        name = str(ROOT / block.place.rpartition(":")[0])
        seen = program.run("\n" * (block.line - 1) + block.text, name, block.place)
        _compare(block.place, shown, seen)
    elif block.language == "bash":
        _compare(block.place, shown, _run_shell(_append(block.text, block), folder, block.place))
    else:
        sessions = list(read_session(block))
        for number, (command, printed) in enumerate(sessions, start=1):
            command = _append(command, block) if number == len(sessions) else command
            _compare(block.place, printed or None, _run_shell(command, folder, block.place))


def read_session(block: Block) -> Iterator[tuple[str, str]]:
    """Of a console block, each command with what it prints.

    Raises:
        PageError: Its first line is no command.
    """
    lines = block.text.splitlines()
    if not lines or not lines[0].startswith("$ "):
        raise PageError(f"{block.place}: a console block begins with a command, `$ COMMAND`")
    while lines:
        command = lines.pop(0)[2:]
        while command.endswith("\\") and lines:
            command += "\n" + lines.pop(0).removeprefix("> ")
        printed = []
        while lines and not lines[0].startswith("$ "):
            printed.append(lines.pop(0))
        yield command, "\n".join(printed)


def matches(shown: str, seen: str) -> bool:
    """Whether a text is what a page shows: `...` stands for any text in a line, or alone in a line for any lines."""
    pattern = ""
    for line in textwrap.dedent(shown).strip().splitlines():
        parts = map(re.escape, line.rstrip().split("..."))
        pattern += r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(parts) + r"\n"
    lines = textwrap.dedent(seen).strip("\n").splitlines()
    return re.fullmatch(pattern, "".join(line.rstrip() + "\n" for line in lines).lstrip()) is not None


def _compare(place: str, shown: str | None, seen: tuple[str, str]) -> None:
    """Either stream may be what the page shows: warnings of libraries are on the other one."""
    if shown is not None and not any(matches(shown, stream) for stream in seen):
        stdout, stderr = (stream[-_TAIL:] for stream in seen)
        raise PageError(f"{place}: shown is\n{shown}\nbut seen was\n{stdout}\nand on stderr\n{stderr}")


def _append(text: str, block: Block) -> str:
    """The commands with what the comment adds to the last one."""
    if "append" not in block.options:
        return text
    first, newline, last = text.rstrip().rpartition("\n")
    return first + newline + re.sub(r"\s+#\s.*$", "", last) + " " + block.options["append"]


def _environment(folder: Path) -> dict[str, str]:
    programs = os.path.dirname(sys.executable)
    environment = make_environment(folder)
    return environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}", "MPLBACKEND": "agg"}


def _run_shell(text: str, folder: Path, place: str) -> tuple[str, str]:
    """What commands print, on stdout and on stderr.

    Raises:
        PageError: One of them fails.
    """
    process = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate()
    finally:
        kill_all(process)
    if process.returncode:
        raise PageError(f"{place}: exit code {process.returncode}\n{text}\n{stdout[-_TAIL:]}\n{stderr[-_TAIL:]}")
    return stdout, stderr


class _PythonProgram:
    """The Python blocks of a page, in a process of their own that begins with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._printed = [folder.parent / f"{folder.name}.{stream}" for stream in ("stdout", "stderr")]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "_PythonProgram":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._process is None:
            return
        try:
            if error is None:
                self._process.stdin.close()
                if self._process.wait():
                    raise PageError(f"the page's Python program ended badly\n{''.join(self._read([0, 0]))[-_TAIL:]}")
        finally:
            kill_all(self._process)
            self._done.close()

    def run(self, source: str, name: str, place: str) -> tuple[str, str]:
        """What a block prints, on stdout and on stderr.

        Raises:
            PageError: It raises an exception, or ends the program.
        """
        if self._process is None:
            self._start()
        before = [path.stat().st_size for path in self._printed]
        self._process.stdin.write(json.dumps([source, name]) + "\n")
        self._process.stdin.flush()
        finished = self._done.readline()
        stdout, stderr = self._read(before)
        if not finished:
            raise PageError(f"{place}: the Python block fails\n{stdout[-_TAIL:]}\n{stderr[-_TAIL:]}")
        return stdout, stderr

    def _start(self) -> None:
        read_end, write_end = os.pipe()
        with contextlib.ExitStack() as stack:
            stdout, stderr = (stack.enter_context(path.open("w")) for path in self._printed)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PYTHON, str(write_end)],
                cwd=self._folder,
                env=_environment(self._folder),
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[write_end],
                text=True,
                start_new_session=True,
            )
        os.close(write_end)
        self._done = os.fdopen(read_end)

    def _read(self, starts: list[int]) -> tuple[str, str]:
        streams = [path.read_bytes()[start:] for path, start in zip(self._printed, starts, strict=True)]
        stdout, stderr = (stream.decode(errors="replace") for stream in streams)
        return stdout, stderr
