"""Every script of `launch/examples` runs as it stands, on two ranks, and its loss falls."""

import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, launch_script

EXAMPLES = sorted((ROOT / "launch" / "examples").glob("*.py"))


@pytest.mark.slow  # what they use has quick tests of its own
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_it_runs_and_learns(script: Path, tmp_path: Path) -> None:
    done = launch_script("torchrun", tmp_path, script, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found = re.search(r"^loss: (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    assert float(found[2]) < 0.95 * float(found[1])


def test_there_are_examples() -> None:
    assert {"accelerate_fsdp2", "deepspeed_loop", "trainer"} < {script.stem for script in EXAMPLES}
