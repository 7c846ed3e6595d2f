"""The command `slsam`: it finds every command, hands over its words, and has not imported torch before."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slsam_ds
from slsam_ds.cli.dispatch import COMMANDS, Command, main

PACKAGE = Path(slsam_ds.__file__).parent


def test_every_module_that_runs_is_a_command() -> None:
    runnable = {path.parent.name for path in PACKAGE.rglob("__main__.py")} - {PACKAGE.name}
    runnable |= {name for name in COMMANDS if (PACKAGE / f"{name}.py").is_file()}
    runnable |= {path.stem for path in PACKAGE.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert runnable - {"__main__"} == set(COMMANDS)
    for command in COMMANDS.values():
        assert importlib.util.find_spec(command.home) is not None


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text and command.text in text for name, command in COMMANDS.items())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"slsam-ds {slsam_ds.__version__}\n"


def test_a_command_gets_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "sam"]) == 0
    assert capsys.readouterr().out.startswith("sam: P = U = all")
    assert main(["report", "/nowhere"]) == 2


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = [sys.executable, "-m", "slsam_ds", "settings"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("docter", "did you mean doctor?"), ("x", "choose one of doctor, estimate"), ("a\nb", "a b: no such")],
)
def test_an_unknown_command_is_refused(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert hint in printed.err
    assert printed.err.count("\n") == 1


def test_a_missing_package_sends_people_to_the_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "run", Command("json.none_such", ""))
    assert main(["run"]) == 1
    assert re.fullmatch(r"error: slsam run: No module .*; run `slsam doctor` .*\n", capsys.readouterr().err)


def test_a_module_of_the_current_folder_is_found(tmp_path: Path) -> None:
    """Installed programs have their own folder on `sys.path`, where `python -m` has the current one."""
    for folder in ("bin", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "slsam").write_text("import sys; from slsam_ds.cli.dispatch import main; sys.exit(main())")
    (tmp_path / "here" / "mine.py").write_text("print('found')")
    call = [sys.executable, str(tmp_path / "bin" / "slsam"), "run", "-m", "mine"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    here = tmp_path / "here"
    done = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "found\n"), done.stderr
    assert "made no Trainer" in done.stderr


def test_help_comes_without_torch() -> None:
    check = "import sys; from slsam_ds.cli.dispatch import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120, capture_output=True)


def test_public_names_and_modules_come_when_they_are_asked_for() -> None:
    check = """
import sys, slsam_ds
assert "torch" not in sys.modules
assert slsam_ds.bandit.Exp3M and "SLSAM" in dir(slsam_ds) and not hasattr(slsam_ds, "nothing")
from slsam_ds import *
assert SLSAMConfig is slsam_ds.SLSAMConfig and initialize is slsam_ds.initialize
"""
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
