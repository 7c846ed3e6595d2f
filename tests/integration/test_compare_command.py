"""`slsam compare` as people start it, and that what it counts of AdamW is what the engine sends without SL-SAM."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer

from slsam_ds.cli.metering import MeteredTrainer
from slsam_ds.records.files import read_settings, read_steps
from slsam_ds.records.traffic import Traffic
from slsam_ds.report.runs import read_run
from slsam_ds.report.writing import COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE
from tests.command_line import make_environment, make_flags, make_folder
from tests.integration.test_reports import make, rows, trained
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow
NUM_STEPS = 3


def test_two_trainings_of_three_steps_on_two_ranks(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    flags = make_flags(folder, "out", max_steps=NUM_STEPS, validation_file=folder / "validation.jsonl")
    call = [sys.executable, "-m", "slsam_ds.compare", "adamw", "defaults", "--num_accelerators", "2", "--", *flags]
    done = subprocess.run(
        call, cwd=folder, env=make_environment(folder), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) < 40
    adamw, ours = (read_run(folder / "out" / name) for name in ("adamw", "defaults"))
    assert len(adamw.history) == len(ours.history) == NUM_STEPS
    assert adamw.history.held_out[0] == ours.history.held_out[0]  # the same start
    assert [step for step, _ in adamw.history.held_out] == [0, NUM_STEPS]
    # The same data in the same order: of the first step, the loss at the weights.
    assert adamw.history.loss_at_weights[0] == pytest.approx(ours.history.loss_at_weights[0], rel=1e-6)
    assert adamw.history.active.all()
    assert not ours.history.active.all()
    for name in ("reduced_bytes", "gathered_bytes", "gradient_bytes", "activation_bytes"):
        assert (getattr(ours.history, name)[1:] < getattr(adamw.history, name)[1:]).all(), name
    assert adamw.has_ended
    assert read_settings(folder / "out" / "adamw")["slsam"]["selector"] == "all"
    for name in (COMPARISON_PAGE_FILE, COMPARISON_PICTURE_FILE):
        assert (folder / "out" / name).is_file()


class CountedTrainer(Trainer):
    """Of transformers, as it is; it tells the bytes of each step."""

    bytes_of_steps: list[dict[str, int]]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with Traffic() as traffic:
            loss = super().training_step(*args, **kwargs)
        self.bytes_of_steps.append(dict(traffic.bytes))
        return loss


def bytes_with_and_without(folder: str) -> tuple[list[dict[str, int]], int]:
    settings = {"gradient_accumulation_steps": 1, "max_steps": NUM_STEPS}
    stock = make(CountedTrainer, f"{folder}/stock", "zero2", rows(24), **settings)
    stock.bytes_of_steps = []
    trained(stock)
    ours = trained(make_metered(f"{folder}/ours", **settings))
    return stock.bytes_of_steps, sum(ours.layer_map.numels_of_all().values())


def make_metered(folder: str, **settings: Any) -> MeteredTrainer:
    """AdamW by SL-SAM's step."""

    class Metered(MeteredTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(slsam={"selector": "all", "rho": 0.0}, **kwargs)

    trainer: MeteredTrainer = make(Metered, folder, "zero2", rows(24), **settings)
    return trainer


def test_bytes_of_adamw_are_those_of_the_engine_without_us(tmp_path: Path) -> None:
    """Within what SL-SAM's statistics and DeepSpeed's padding take, which show beside so small a model."""
    stock, num_weights = run_on_ranks(2, bytes_with_and_without, str(tmp_path))[0]
    ours = read_steps(tmp_path / "ours")
    assert len(stock) == len(ours) == NUM_STEPS
    for without, record in list(zip(stock, ours, strict=True))[1:]:
        assert record["reduced_bytes"] == pytest.approx(without["reduce"], rel=0.02)
        assert record["gathered_bytes"] == pytest.approx(without["gather"], rel=0.02)
        assert num_weights * 2 <= record["gradient_bytes"] <= num_weights * 4
