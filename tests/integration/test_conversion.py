"""Scripts as the libraries' documentation has them, converted by the README's own diffs, train."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from slsam_ds.records.files import read_steps
from slsam_ds.state.files import STATE_FILE
from tests.command_line import ROOT, launch_script

STOCK = ROOT / "tests" / "stock"
MAX_CHANGED_LINES = 10


def readme_diffs() -> list[str]:
    return re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def convert(name: str) -> str:
    """The stock script with the hunks of the README's diff for it, which are separated by empty lines."""
    source = (STOCK / name).read_text(encoding="utf-8")
    removed = [line[1:] for diff in readme_diffs() for line in diff.splitlines() if line.startswith("-")]
    assert any(line in source for line in removed), f"the README has no diff for {name}"
    num_changed = 0
    for diff in readme_diffs():
        hunks = [hunk.splitlines() for hunk in diff.strip("\n").split("\n\n")]
        before = ["\n".join(line[1:] for line in hunk if line[0] in " -") for hunk in hunks]
        after = ["\n".join(line[1:] for line in hunk if line[0] in " +") for hunk in hunks]
        if not all(text in source for text in before):
            continue
        for old, new in zip(before, after, strict=True):
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        num_changed += sum(line[0] == "+" for hunk in hunks for line in hunk)
    assert 0 < num_changed <= MAX_CHANGED_LINES
    return source


def run(launcher: str, folder: Path, source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(source, encoding="utf-8")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "slsam": {"active_layers": 2, "rho": 0.02},
    }
    (folder / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    return launch_script(launcher, folder, "script.py", *flags)


@pytest.mark.parametrize("changed", [pytest.param("nothing", marks=pytest.mark.slow), "two lines"])
def test_a_deepspeed_script_trains(changed: str, tmp_path: Path) -> None:
    is_stock = changed == "nothing"
    source = (STOCK / "deepspeed_script.py").read_text() if is_stock else convert("deepspeed_script.py")
    done = run("deepspeed", tmp_path, source, "--deepspeed", "--deepspeed_config", "ds.json")
    assert done.returncode == 0, done.stdout + done.stderr
    (first, last) = re.findall(r"steps 12, loss ([\d.]+) -> ([\d.]+)", done.stdout)[0]
    assert float(last) < 0.9 * float(first)
    assert done.stderr.count("SL-SAM is on in DeepSpeedEngine: ") == int(not is_stock)
    assert len(list((tmp_path / "checkpoints").glob(f"*/{STATE_FILE}"))) == int(not is_stock)


def test_a_trainer_script_trains(tmp_path: Path) -> None:
    done = run("forked", tmp_path, convert("trainer_script.py"), "ds.json")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = read_steps(tmp_path / "output")
    assert len(steps) == 12
    assert done.stderr.count("SL-SAM is on in SLSAMTrainer: ascent_fraction=0.25 budget=1.0 (else defaults)") == 1
    assert steps[-1]["ascent_loss"] < 0.9 * steps[0]["ascent_loss"]
