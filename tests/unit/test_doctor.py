"""`slsam doctor`: what it makes of what it finds, told by fakes; and the command on this machine."""

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import slsam_ds
from slsam_ds.cli.doctor import command
from slsam_ds.cli.doctor.examination import run_findings
from slsam_ds.cli.doctor.finding import Finding, any_problem, as_text
from slsam_ds.cli.doctor.machine import Machine, machine_findings
from slsam_ds.cli.doctor.packages import NEEDED, Packages, import_findings, package_findings, read_packages
from slsam_ds.cli.estimate_arguments import RunArguments, parse_run
from slsam_ds.engines.deepspeed.operators import (
    CPU_ADAM,
    FUSED_ADAM,
    SHARED_MEMORY,
    Operator,
    find_operator,
    missing_tools,
    needed_operators,
)
from tests.models import tiny_llama

ROOT = Path(__file__).parents[2]


def lines(findings: list[Finding], verdict: str) -> list[str]:
    return [str(finding) for finding in findings if finding.verdict == verdict]


# Packages


def packages(**changes: Any) -> Packages:
    """All as tried, but for the changes to what is installed; None takes one away."""
    installed = {"slsam-ds": slsam_ds.__version__, "python": "3.11.9", "torch": "2.13.0+cu130", "deepspeed": "0.19.2"}
    return Packages(
        installed={name: version for name, version in (installed | changes).items() if version is not None},
        needed={
            "python": SpecifierSet(">=3.11"),
            "torch": SpecifierSet(">=2.8"),
            "deepspeed": SpecifierSet(">=0.18.6,<0.20"),
        },
        optional={"trl": SpecifierSet(">=0.24.0,<2")},
        tried={"python": ["3.11.2", "3.11.7"], "torch": ["2.13.0+cpu"], "deepspeed": ["0.18.6", "0.19.8"], "trl": []},
    )


def test_versions_that_were_tried_take_one_line() -> None:
    (found,) = package_findings(packages())
    assert str(found) == "ok       tested versions: python 3.11.9, torch 2.13.0+cu130, deepspeed 0.19.2"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"torch": None}, 'problem  torch: not installed; pip install "torch>=2.8"'),
        (
            {"deepspeed": "0.20.1"},
            'problem  deepspeed 0.20.1: slsam-ds supports <0.20,>=0.18.6; pip install "deepspeed<0.20,>=0.18.6"',
        ),
        ({"python": "3.10.4"}, "problem  python 3.10.4: slsam-ds supports >=3.11; use Python >=3.11"),
        ({"python": "3.12.1"}, "note     python 3.12.1: not tested; tests passed with 3.11"),
        ({"deepspeed": "0.19.9"}, "note     deepspeed 0.19.9: not tested; tests passed with 0.18.6 to 0.19.8"),
        ({"torch": "2.9.1"}, "note     torch 2.9.1: not tested; tests passed with 2.13.0"),
        ({"trl": "2.0"}, "note     trl 2.0: slsam-ds supports <2,>=0.24.0; or do without it"),
        (
            {"slsam-ds": None},
            "note     slsam-ds: not installed but run from its folder, so the supported versions are unknown; "
            "pip install it",
        ),
        (
            {"slsam-ds": "0.0.1"},
            f"note     slsam-ds: {slsam_ds.__version__} runs, but 0.0.1 is installed; its supported versions are used "
            "here; reinstall it",
        ),
    ],
)
def test_a_version_that_is_not_gets_its_own(changes: dict[str, Any], line: str) -> None:
    assert line in map(str, package_findings(packages(**changes)))


def test_what_is_needed_is_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {Requirement(each).name for each in project["dependencies"]} == set(NEEDED)
    found = read_packages()
    assert set(NEEDED) <= set(found.needed)
    assert all(found.tried[name] for name in NEEDED)


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so.13:\\n cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = import_findings(["json", "broken_package", "never_reached"])
    assert "problem  broken_package: cannot be imported (OSError: libcudart.so.13: cannot open)" in str(found)
    assert import_findings(["json"]) == []


# The machine


def machine(**changes: Any) -> Machine:
    """Four cards and nothing wrong, but for the changes."""
    fine = Machine(
        kind="cuda",
        devices=["NVIDIA H200"] * 4,
        memory=140 * 10**9,
        host_memory=10**12,
        num_cores=64,
        torch_build="2.13.0+cu130",
        torch_cuda="13.0",
        has_driver=True,
        backend="nccl",
        has_backend=True,
        nccl="2.28.9",
        shared_memory=2**33,
        needed=[],
        others=[Operator("fused_adam", "built"), Operator("cpu_adam", "can be built")],
        missing_tools=[],
        locks=[],
        environment={},
    )
    return dataclasses.replace(fine, **changes)


CPU: dict[str, Any] = {
    "kind": "cpu", "devices": [], "backend": "gloo", "nccl": "", "has_driver": False, "torch_cuda": None,
    "memory": 8 * 10**9, "host_memory": 8 * 10**9, "num_cores": 2, "torch_build": "2.13.0+cpu",
}  # fmt: skip
NO_COMPILER = {"missing_tools": ["a C++ compiler (c++)"]}


def test_a_machine_with_nothing_wrong() -> None:
    found = machine_findings(machine())
    assert {finding.verdict for finding in found} == {"ok"}
    text = as_text(found)
    for expected in (
        "4 x NVIDIA H200, 140 GB each",
        "ranks communicate by nccl 2.28.9",
        "built: fused_adam",
        "no problems",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("changes", "verdict", "texts"),
    [
        (CPU, "note", ["no accelerator", "2 cores and 8 GB"]),
        ({**CPU, "environment": {"DS_ACCELERATOR": "cpu"}}, "note", ["DS_ACCELERATOR=cpu", "unset it"]),
        ({**CPU, "has_driver": True}, "problem", ["2.13.0+cpu is a build for the CPU", "install a build for CUDA"]),
        ({**CPU, "has_driver": True, "torch_cuda": "13.0"}, "problem", ["finds no GPU", "CUDA_VISIBLE_DEVICES"]),
        ({"has_backend": False}, "problem", ["nccl: this torch lacks the backend"]),
        (
            {**NO_COMPILER, "others": [Operator("cpu_adam", "cannot be built", "not here: a C++ compiler (c++)")]},
            "note",
            [
                "cpu_adam cannot be built (not here: a C++ compiler (c++))",
                "only offload_optimizer needs it; install a C",
            ],
        ),
        (
            {**CPU, **NO_COMPILER, "needed": [Operator("deepspeed_shm_comm", "cannot be built", "no compiler")]},
            "problem",
            ["deepspeed_shm_comm cannot be built (no compiler)", "every run under DeepSpeed", "install a C++ compiler"],
        ),
        ({"locks": [Path("/x/lock")]}, "problem", ["/x/lock: no process on this machine holds this lock", "remove it"]),
        ({"shared_memory": 64 * 2**20}, "note", ["/dev/shm: 67 MB", "--shm-size"]),
        ({"environment": {"OMP_NUM_THREADS": "128"}}, "note", ["OMP_NUM_THREADS=128: more threads than the 64 cores"]),
        ({"environment": {"OMP_NUM_THREADS": "all"}}, "note", ["OMP_NUM_THREADS=all: not a number"]),
        ({"environment": {"OMP_NUM_THREADS": "2"}}, "ok", ["OMP_NUM_THREADS=2"]),
    ],
)
def test_what_is_wrong_with_a_machine_is_said(changes: dict[str, Any], verdict: str, texts: list[str]) -> None:
    said = lines(machine_findings(machine(**changes)), verdict)
    assert any(all(text in line for text in texts) for line in said), said


def test_tools_that_are_not_on_the_path_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = missing_tools()
    assert missing[0] == "a C++ compiler (c++)"
    assert missing[1].startswith("ninja")
    assert find_operator(CPU_ADAM, missing).state == "cannot be built"


def test_operators_are_looked_for_where_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert find_operator(CPU_ADAM, []) == Operator("cpu_adam", "can be built")
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "cpu_adam.so").touch()
    assert find_operator(CPU_ADAM, []) == Operator("cpu_adam", "built")
    assert find_operator("NoneSuchBuilder", []).state == "cannot be built"


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({}, []),
        ({"optimizer": {"type": "AdamW"}}, [FUSED_ADAM]),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, []),
        ({"optimizer": {"type": "SGD"}}, []),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, [CPU_ADAM]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}, "optimizer": {"type": "Adam"}}, [CPU_ADAM]),
    ],
)
def test_operators_that_a_configuration_needs(config: dict[str, Any], needed: list[str]) -> None:
    always = needed_operators(None)
    assert set(always) <= {SHARED_MEMORY}
    assert needed_operators(config) == [*always, *needed]


# The run


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_llama().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def examined(*flags: str, on: Machine | None = None) -> list[Finding]:
    return run_findings(parse_run(flags, RunArguments), on or machine())


def test_without_a_run_nothing_is_said_of_one() -> None:
    assert examined() == []
    assert examined("--world_size", "2") == []


def test_a_run_that_works_has_a_price_and_fits(model: str) -> None:
    found = examined("--deepspeed", "zero2", "--model", model, "--slsam", "active_layers=2")
    assert not any_problem(found)
    text = as_text(found)
    for expected in (
        "zero2: ZeRO-2 in bf16 is supported",
        "rho 0.05, active_layers 2",
        "of AdamW's FLOPs",
        "(dense SAM 2.00)",
        "on 4 ranks",  # one for each card
        "GB on each rank (AdamW",
    ):
        assert expected in text
    assert "budget 1" in as_text(examined("--zero", "3", "--slsam", "preset=adamw_price"))


@pytest.mark.parametrize(
    ("config", "flags", "text"),
    [
        ('{"hybrid_engine": {"enabled": true}}', [], "hybrid_engine.enabled=true: not supported"),
        ('{"zero_optimization": {"stage": 4}}', [], "zero_optimization.stage=4"),
        ('{"slsam": {"rh": 1}}', [], "slsam.rh: unknown key; did you mean rho?"),
        ('{"fp16": {"enabled": true}}', [], "fp16.enabled=true: needs zero_optimization.stage 1, 2 or 3"),
        ("{}", ["--model", "MODEL", "--slsam", "active_layers=99"], "slsam.active_layers=99: choose a fraction"),
        ("{}", ["--model", "MODEL", "--sequence_length", "99999"], "--sequence_length 99999: choose from 2"),
    ],
)
def test_what_will_not_work_is_a_problem(config: str, flags: list[str], text: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(config)
    flags = [model if flag == "MODEL" else flag for flag in flags]
    problems = lines(examined("--deepspeed", str(tmp_path / "ds.json"), *flags), "problem")
    assert len(problems) == 1
    assert text in problems[0]


def test_precision_and_operators_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    accelerator = "slsam_ds.cli.doctor.examination.get_accelerator"
    no_bf16 = type("Accelerator", (), {"is_bf16_supported": lambda self: False, "is_fp16_supported": lambda self: True})
    monkeypatch.setattr(accelerator, no_bf16)
    assert "bf16: not supported by cuda here; use fp32 or fp16" in as_text(examined("--zero", "2"))
    found = examined("--deepspeed", "zero2_offload", on=machine(**NO_COMPILER))
    assert "zero2_offload: needs DeepSpeed's operator cpu_adam, which cannot be built" in as_text(found)


def test_a_run_that_does_not_fit_is_a_problem(model: str) -> None:
    for small in ({"memory": 1000}, {**CPU, "host_memory": 1000}):
        (problem,) = lines(examined("--zero", "2", "--model", model, on=machine(**small)), "problem")
        assert "GB on each rank" in problem
        assert "; try more ranks (--world_size), a higher ZeRO stage" in problem
    offloaded = examined("--zero", "2", "--offload_optimizer", "--model", model, on=machine(host_memory=1000))
    assert "GB of its host, and a device has 140 GB, the host 0 GB" in as_text(offloaded)


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "read_packages", packages)
    monkeypatch.setattr("slsam_ds.cli.command_line.quieten", lambda: None)
    monkeypatch.setattr("slsam_ds.cli.doctor.machine.look_around", machine)


@pytest.mark.usefixtures("quick")
def test_exit_codes(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main([]) == 0
    assert capsys.readouterr().out.endswith("\nno problems\n")
    assert command.main(["--model", model, "--slsam", "rho=-1"]) == 1
    assert "problem  slsam.rho=-1" in capsys.readouterr().out
    for flags, sentence in (
        (["--deepspeed", "none.json"], "DeepSpeed configuration none.json: cannot be read"),
        (["--deepspeed", "zero9"], "cannot be read (No such file or directory); by name there are zero0, zero1"),
        (["--model", "/nowhere/model"], "--model /nowhere/model: no such folder or file"),
        (["--modle", model], "--modle: unknown flag; did you mean --model?"),
        (["--fsdp", "--zero", "2"], "--fsdp excludes --zero"),
    ):
        assert command.main(flags) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert sentence in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    monkeypatch.setattr(command, "read_packages", lambda: packages(torch=None))
    assert command.main([]) == 1  # and looks no further
    assert capsys.readouterr().out.endswith("\n1 problem\n")


@pytest.mark.usefixtures("quick")
def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for expected in (
        "usage: slsam doctor",
        "slsam doctor --deepspeed zero2 --model",
        "exit codes: 0",
        "--world_size N",
    ):
        assert expected in text


def test_as_a_command(tmp_path: Path, model: str) -> None:
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    call = [sys.executable, "-m", "slsam_ds.doctor", "--deepspeed", "zero3", "--model", model]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    *told, empty, counts = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "note", "problem") for line in told), done.stdout
    assert empty == ""
    assert "1 problem" in counts
    assert any("cpu_adam/lock: no process on this machine holds this lock" in line for line in told)
