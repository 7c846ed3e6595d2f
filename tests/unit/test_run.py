"""What `python -m slsam_ds.run` understands of its command line and environment, before it runs anything."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from slsam_ds.cli.run import Command, read_command
from slsam_ds.config import SLSAMConfig


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text("print('no trainer here')")
    return str(path)


def test_what_follows_the_script_is_the_scripts(script: str) -> None:
    flags = ["--slsam", "rho=0.1", "--", "-m", "--help"]
    for ours in ([], ["--"], ["--slsam", "rho=0.02", "active_layers=4", "--slsam", "seed=1", "--"]):
        command = read_command([*ours, script, *flags], {})
        assert (command.name, command.is_module, command.arguments) == (script, False, flags)
    assert command.choose() == SLSAMConfig(rho=0.02, active_layers=4, seed=1)


@pytest.mark.parametrize("ours", [["-m"], ["--", "-m"], ["--slsam", "rho=0.02", "-m"], ["--module"]])
def test_a_module(ours: list[str]) -> None:
    command = read_command([*ours, "some.module", "-m", "x"], {})
    assert (command.name, command.is_module, command.arguments) == ("some.module", True, ["-m", "x"])


@pytest.mark.parametrize("given", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_launchers_local_rank_is_handed_on(given: list[str], script: str) -> None:
    command = read_command([*given, "--slsam", "rho=0.02", "--", script, "--x"], {})
    assert command.arguments == [given[0].removesuffix("=1") + "=1", "--x"]


def chosen(*assignments: str, environment: str | None, block: Mapping[str, object] | None) -> SLSAMConfig:
    variables = {} if environment is None else {"SLSAM_CONFIG": environment}
    ours = ["--slsam", *assignments] if assignments else []
    return read_command([*ours, "-m", "some.module"], variables).choose(block)


def test_knobs_come_from_the_environment_else_the_json_and_flags_lie_over_them(tmp_path: Path) -> None:
    (tmp_path / "knobs.json").write_text(json.dumps({"rho": 0.2}))
    block = {"rho": 0.3, "seed": 3}
    assert chosen(environment=None, block=None) == SLSAMConfig()
    assert chosen(environment=None, block=block) == SLSAMConfig(rho=0.3, seed=3)
    assert chosen("rho=0.1", environment=None, block=block) == SLSAMConfig(rho=0.1, seed=3)
    assert chosen(environment='{"rho": 0.2}', block=block) == SLSAMConfig(rho=0.2)
    assert chosen("seed=4", environment=str(tmp_path / "knobs.json"), block=None) == SLSAMConfig(rho=0.2, seed=4)


@pytest.mark.parametrize(
    ("given", "environment", "sentence"),
    [
        ([], {}, "required: SCRIPT"),
        (["--"], {}, "SCRIPT"),
        (["-m"], {}, "required: SCRIPT"),
        (["--", "-m"], {}, "nothing to run"),
        (["--slsam", "rho=1", "script.py"], {}, "put -- before the script, as in --slsam rho=0.02 -- script.py"),
        (["--slsam", "sam", "--", "script.py"], {}, "sam: expected KEY=VALUE, as in --slsam preset="),
        (["absent.py"], {}, "absent.py: no such script; to run a module, give -m before it"),
        (["--slsam", "rh=1", "-m", "x"], {}, "did you mean rho?"),
        (["--learning_rate", "1", "-m", "x"], {}, "--learning_rate"),
        (["-m", "x"], {"SLSAM_CONFIG": "absent.json"}, "SLSAM_CONFIG=absent.json: expected a JSON object"),
        (["-m", "x"], {"SLSAM_CONFIG": "{"}, "SLSAM_CONFIG={: expected a JSON object"),
        (["-m", "x"], {"SLSAM_CONFIG": '{"rho": -1}'}, "slsam.rho=-1"),
    ],
)
def test_what_cannot_be_used_is_refused(
    given: list[str], environment: Mapping[str, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        read_command(given, environment)
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_script_without_a_trainer_is_no_success(script: str) -> None:
    command = [sys.executable, "-m", "slsam_ds.run", "--", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "no trainer here\n"
    assert f"error: {script}: made no Trainer" in done.stderr


def test_the_scripts_own_exit_code_stays(script: str) -> None:
    Path(script).write_text("raise SystemExit(7)")
    done = subprocess.run([sys.executable, "-m", "slsam_ds.run", script], timeout=120)
    assert done.returncode == 7


def test_nothing_that_reads_the_environment_is_imported_before_the_script(script: str) -> None:
    heavy = {"transformers", "accelerate", "huggingface_hub", "datasets", "deepspeed"}
    Path(script).write_text(f"import sys; loaded = {heavy} & set(sys.modules); raise SystemExit(str(loaded))")
    done = subprocess.run([sys.executable, "-m", "slsam_ds.run", script], capture_output=True, text=True, timeout=120)
    assert done.stderr == "set()\n"


def test_a_command_is_a_value() -> None:
    assert read_command(["-m", "x"], {}) == Command("x", True, [], [], None)
