"""`python -m slsam_ds.run` turns the trainers of a script into SL-SAM's: to the bit what a changed script does."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slsam_ds.records.files import read_steps
from tests.command_line import ROOT, launch_script
from tests.integration.engines import ENGINES

SOURCE = (ROOT / "tests" / "stock" / "two_trainers_script.py").read_text(encoding="utf-8")
KNOBS = {"rho": 0.02, "active_layers": 2, "seed": 1}
ASSIGNMENTS = [f"{name}={value}" for name, value in KNOBS.items()]


def changed_by_hand() -> str:
    """The script as somebody would change it who derives the trainers."""
    source = SOURCE
    for old, new in (
        ("\nparser =", "\nfrom slsam_ds.integrations.huggingface import SLSAMMixin, SLSAMTrainer\n\nparser ="),
        ("class CalibratedTrainer(Trainer)", "class CalibratedTrainer(SLSAMTrainer)"),
        ("in (Trainer, CalibratedTrainer)", "in (SLSAMTrainer, CalibratedTrainer)"),
        ("= trainer_class(", f"= trainer_class(slsam={KNOBS}, "),
    ):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def run(launcher: str, folder: Path, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
    (folder / "ds.json").write_text(json.dumps(ENGINES["zero2"]["deepspeed"]))
    return launch_script(launcher, folder, *flags, **options)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"name"')))


@pytest.mark.parametrize(
    ("launcher", "entry", "warm", "flags"),
    [
        ("forked alone", [str(ROOT / "slsam_ds" / "run.py")], "forked alone", []),
        ("torchrun", ["-m", "slsam_ds.run"], "forked", []),
        ("deepspeed", ["--module", "slsam_ds.run"], "forked", ["--deepspeed", "ds.json"]),
        pytest.param("accelerate", ["-m", "slsam_ds.run"], "forked alone", [], marks=pytest.mark.slow),
    ],
)
def test_it_is_to_the_bit_the_trainer_that_one_would_derive(
    launcher: str, entry: list[str], warm: str, flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SOURCE)
    done = run(launcher, tmp_path, *entry, "--slsam", *ASSIGNMENTS, "--", "script.py", *flags)
    ours = result_of(done)
    assert ours["name"] == "__main__"
    given = ours["argv"][1:] if launcher == "deepspeed" else ours["argv"]
    assert given == flags
    for name in ("Trainer", "CalibratedTrainer"):
        assert done.stderr.count(f"SL-SAM is on in {name}: rho=0.02 active_layers=2 seed=1 (else defaults)") == 1
    assert all(len(step["active"]) == 2 for step in read_steps(tmp_path / "output"))

    (tmp_path / "script.py").write_text(changed_by_hand())
    by_hand = result_of(run(warm, tmp_path, "script.py", *flags))
    renamed = {name.removeprefix("SLSAM"): history for name, history in by_hand["histories"].items()}
    assert ours["histories"] == renamed


def test_a_framework_that_loads_our_plugin_trains_with_sl_sam(tmp_path: Path) -> None:
    done = launch_script("forked alone", tmp_path, ROOT / "tests" / "stock" / "axolotl_script.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SL-SAM is on in AxolotlTrainer: rho=0.02 active_layers=2 (else defaults)" in done.stderr
    assert [len(step["active"]) for step in read_steps(tmp_path / "output")] == [2, 2, 2]
