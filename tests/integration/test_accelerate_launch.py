"""Trainers and `launch/train.py` where `accelerate launch` brings DeepSpeed, and nobody else speaks of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from slsam_ds.records.files import read_steps
from tests.command_line import NUM_STEPS, launch, make_flags, make_folder
from tests.integration.engines import BATCH
from tests.integration.test_trainer import make_trainer
from tests.ranks import run_on_ranks

# What `accelerate config` writes, and what one adds by hand.
SECTION = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 2
  gradient_accumulation_steps: {accumulation}
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
mixed_precision: bf16
num_machines: 1
num_processes: 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("accelerate_launch"))


def test_the_command_line_runs_in_the_engine_of_the_launchers_section(folder: Path) -> None:
    (folder / "accelerate.yaml").write_text(SECTION.format(accumulation=2))
    flags = make_flags(folder, "out", deepspeed=None, gradient_accumulation_steps=2)
    run = launch("accelerate with a file", folder, *flags, "--slsam", "active_layers=2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "on 2 ranks" in run.stdout
    steps = read_steps(folder / "out")
    assert len(steps) == NUM_STEPS
    assert all(len(step["active"]) == 2 for step in steps)


def _train(folder: str, variables: dict[str, str], slsam: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """What SL-SAM runs in and with, or what it is refused with."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", **variables}
    try:
        trainer = make_trainer(folder, deepspeed=None, max_steps=2, slsam=slsam)
    except ValueError as error:
        return str(error), {}
    trainer.train()
    assert trainer.slsam is not None
    return type(trainer.slsam.engine).__name__, trainer.slsam_config.to_dict()


def test_a_trainer_runs_in_the_engine_of_the_launchers_section(tmp_path: Path) -> None:
    variables = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}
    for engine, knobs in run_on_ranks(2, _train, str(tmp_path), variables, {"active_layers": 2}):
        assert engine == "ZeroStage3Engine"
        assert knobs["active_layers"] == 2
    assert len(read_steps(tmp_path)) == 2


def test_a_json_that_the_section_names_brings_the_knobs(tmp_path: Path) -> None:
    config = {**BATCH, "zero_optimization": {"stage": 1}, "slsam": {"rho": 0.02, "active_layers": 3}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    variables = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    for engine, knobs in run_on_ranks(2, _train, str(tmp_path), variables, None):
        assert engine == "ZeroStage12Engine"
        assert (knobs["rho"], knobs["active_layers"]) == (0.02, 3)


def test_a_section_that_contradicts_the_arguments_is_refused(tmp_path: Path) -> None:
    """At construction: transformers itself would say so once training starts."""
    variables = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}
    ((refusal, _),) = run_on_ranks(1, _train, str(tmp_path), variables, None)
    assert refusal.startswith("DeepSpeed's configuration contradicts the arguments: gradient_accumulation_steps=8 but")
    assert "\n" not in refusal
