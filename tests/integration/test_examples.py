"""Every script of `launch/examples` runs as it stands, on two ranks, and its loss falls."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
QUICK = {"accelerate_fsdp2", "deepspeed_loop", "trl_sft_lora"}  # one of each kind; the Trainer has tests of its own
EXAMPLES = [
    pytest.param(script, id=script.stem, marks=[] if script.stem in QUICK else pytest.mark.slow)
    for script in sorted((ROOT / "launch" / "examples").glob("*.py"))
]


@pytest.mark.parametrize("script", EXAMPLES)
def test_it_runs_and_learns(script: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found = re.search(r"^loss: (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    assert float(found[2]) < 0.95 * float(found[1])


def test_there_are_examples() -> None:
    assert {example.values[0].stem for example in EXAMPLES} > QUICK
