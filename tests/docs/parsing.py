"""What the real parsers say of commands that are not run: `python -m tests.docs.parsing` in a process of its own.

It reads command lines from stdin, as JSON, and writes what is wrong with each. A program is started as its own command
starts it, and stopped as soon as it has parsed its flags. Words that stand for something, which are in capitals or
begin with `$`, fit every flag.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from slsam_ds.cli.refusal import UsageError
from tests.command_line import ROOT

_LAUNCHERS = {
    "deepspeed": "deepspeed.launcher.runner",
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}
_OURS = ("slsam_ds", "benchmarks", "tests")
_PLACEHOLDER = re.compile(r"\$\{?\w+\}?|[A-Z][A-Z_]*")
_FURTHER_WORDS = ("FLAGS", "ARGS", "ARGUMENTS", "...")
"""They stand for any number of flags, or none."""
_REDIRECTION = re.compile(r"\s\d?[<>]+&?\s*[^\s;&|]+")
_BEFORE = ("nice", "env", "time", "if", "then", "else", "do", "while", "!")
_ENDS = ("&&", "||", "|", ";", "&", "(", ")")


def wrong_with(texts: Sequence[str]) -> list[str]:
    """What is wrong with each of some texts of commands: a sentence, or nothing.

    One process answers for all, as it takes seconds to import the programs.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    call = [sys.executable, "-m", "tests.docs.parsing"]
    done = subprocess.run(
        call, cwd=ROOT, env=environment, input=json.dumps(texts), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def split_commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell text, in words: without comments, redirections and the words that control it.

    Raises:
        ValueError: A quotation has no end.
    """
    command: list[str] = []
    for word in _words(text):
        if word not in _ENDS:
            command.append(word)
        elif command:
            yield command
            command = []


def _words(text: str) -> Iterator[str]:
    lines = text.replace("\\\n", " ").splitlines()
    while lines:
        line = lines.pop(0)
        try:
            words = _split(line)
        except ValueError:
            if not lines:
                raise
            lines[0] = f"{line}\n{lines[0]}"  # a quotation goes on
            continue
        yield from [*words, ";"]


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(_REDIRECTION.sub("", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def check(words: Sequence[str]) -> str:
    """What is wrong with a command; nothing, where nothing is known of its program."""
    words = [word for word in words if word not in _FURTHER_WORDS]
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in _BEFORE):
        words = words[1:]
    match words:
        case ["slsam", "train", *arguments] | ["python", "launch/train.py", *arguments]:
            return _check_training(arguments)
        case ["python", "-m", "slsam_ds.train", *arguments]:
            return _check_training(arguments)
        case ["slsam", *arguments] if arguments:
            return _check_module("slsam_ds", arguments)
        case ["python", "-m", module, *arguments] if module.partition(".")[0] in _OURS:
            return _check_module(module, arguments)
        case ["python", path, *_] if path.startswith("launch/"):
            return "" if (ROOT / path).is_file() else f"{path}: no such file"
        case [program, *arguments] if program in _LAUNCHERS and arguments not in ([], ["launch"]):
            return _check_module(_LAUNCHERS[program], arguments)
        case ["sbatch", *arguments]:
            (place,) = (place for place, word in enumerate(arguments) if word.endswith(".sbatch"))
            missing = "" if (ROOT / arguments[place]).is_file() else f"{arguments[place]}: no such file"
            return missing or _check_training(arguments[place + 1 :])
        case ["make", *arguments]:
            done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
            return done.stderr if done.returncode else ""
        case ["pytest", *arguments]:
            return _check_pytest(arguments)
    return ""


class _Parsed(BaseException):
    """Flags were parsed: the program ends here."""

    def __init__(self, found: argparse.Namespace) -> None:
        self.found = found


def _check_training(arguments: Sequence[str]) -> str:
    """As the command does, but without the process group that it would make before."""
    from slsam_ds.cli.settings import read_settings

    helps = {"--help", "-h"} & set(arguments)
    return "" if helps or not arguments else _until_parsed(arguments, lambda: read_settings(arguments))


def _check_module(name: str, arguments: Sequence[str]) -> str:
    if _PLACEHOLDER.fullmatch(name.rpartition(".")[2]):
        return ""
    if importlib.util.find_spec(name) is None:
        return f"no module {name}"
    return _until_parsed(arguments, lambda: runpy.run_module(name, run_name="__main__")) if arguments else ""


def _until_parsed(arguments: Sequence[str], program: Callable[[], object]) -> str:
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["program", *arguments]),
        mock.patch.dict(os.environ),
        _lenient_parsers(),
        contextlib.redirect_stderr(printed),
        contextlib.redirect_stdout(printed),
    ):
        try:
            program()
        except _Parsed as end:
            return _check_parsed(end.found)
        except SystemExit as end:
            return printed.getvalue() or str(end) if end.code else ""
        except (ImportError, UsageError) as error:
            return str(error)
    return ""


def _check_parsed(found: argparse.Namespace) -> str:
    """What is wrong with the flags' values, and with the program that a launcher is to start."""
    values = vars(found)
    knobs = [knob for knob in values.get("slsam") or () if not _PLACEHOLDER.search(knob)]
    if knobs:
        from slsam_ds.config import SLSAMConfig

        try:
            SLSAMConfig.from_assignments(knobs)
        except ValueError as error:
            return str(error)
    script = values.get("user_script") or values.get("training_script")
    arguments = values.get("user_args") or values.get("training_script_args")
    if not script or not arguments:
        return ""
    return check(["python", *(["-m"] if found.module else []), script, *arguments])


@contextlib.contextmanager
def _lenient_parsers() -> Iterator[None]:
    """Within, parsers take any placeholder, and stop the program once they know all flags."""
    parser = argparse.ArgumentParser
    parse, get_value, check_value = parser.parse_known_args, parser._get_value, parser._check_value

    def parse_known_args(self: Any, *args: Any, **options: Any) -> Any:
        found, unknown = parse(self, *args, **options)
        if unknown:
            return found, unknown  # of which the program itself will complain
        raise _Parsed(found)

    def value_of(self: Any, action: Any, text: str) -> Any:
        return text if _PLACEHOLDER.fullmatch(text) else get_value(self, action, text)

    def check_choice(self: Any, action: Any, value: Any) -> None:
        if not (isinstance(value, str) and _PLACEHOLDER.fullmatch(value)):
            check_value(self, action, value)

    with mock.patch.multiple(parser, parse_known_args=parse_known_args, _get_value=value_of, _check_value=check_choice):
        yield


def _check_pytest(arguments: Sequence[str]) -> str:
    """Whether the paths are there, and a test has each word of `-k` in its name or its file's."""
    import pytest

    config = pytest.Config.fromdictargs({}, [])
    found, unknown = config._parser.parse_known_and_unknown_args(list(arguments))
    if unknown:
        return f"pytest: unknown flags {' '.join(unknown)}"
    folders = [ROOT / path.partition("::")[0] for path in found.file_or_dir or ["tests"]]
    missing = [str(folder) for folder in folders if not folder.exists()]
    if missing:
        return f"{missing[0]}: no such file"
    files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("test_*.py"))]
    names = " ".join(f"{file.stem} {' '.join(_test_names(file))}" for file in files)
    words = set(re.findall(r"\w+", found.keyword)) - {"and", "or", "not"}
    unmatched = sorted(word for word in words if word not in names)
    return f"pytest -k {found.keyword!r}: no test has {unmatched[0]} in its name" if unmatched else ""


def _test_names(file: Path) -> list[str]:
    return re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))


def _answer(text: str) -> str:
    try:
        commands = list(split_commands(text))
    except ValueError as error:
        return f"{text}: {error}"
    wrong = ((" ".join(command), check(command)) for command in commands)
    return "; ".join(f"{command}: {answer.strip()}" for command, answer in wrong if answer)


if __name__ == "__main__":
    # Libraries print what they like.
    answers = [_answer(text) for text in json.load(sys.stdin)]
    print("\n" + json.dumps(answers))
