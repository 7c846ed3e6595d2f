"""Every script of `launch/examples` runs as it stands, on two ranks, and its loss falls."""

import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, launch_script

QUICK = {"deepspeed_loop"}  # what the others use has quick tests of its own
EXAMPLES = [
    pytest.param(script, id=script.stem, marks=[] if script.stem in QUICK else pytest.mark.slow)
    for script in sorted((ROOT / "launch" / "examples").glob("*.py"))
]


@pytest.mark.parametrize("script", EXAMPLES)
def test_it_runs_and_learns(script: Path, tmp_path: Path) -> None:
    done = launch_script("torchrun", tmp_path, script, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found = re.search(r"^loss: (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    assert float(found[2]) < 0.95 * float(found[1])


def test_there_are_examples() -> None:
    assert {example.values[0].stem for example in EXAMPLES} > QUICK
