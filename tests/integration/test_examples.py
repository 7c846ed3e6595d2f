"""Every script of `launch/examples` runs as it stands, on two ranks, and its loss falls."""

import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, launch_script

EXAMPLES = sorted((ROOT / "launch" / "examples").glob("*.py"))


PRESETS = {"encoder_classification": "paper_encoder", "vision": "paper_vision"}
RUNS = [(script.stem, []) for script in EXAMPLES] + [(name, ["--preset", preset]) for name, preset in PRESETS.items()]


@pytest.mark.slow  # what they use has quick tests of its own
@pytest.mark.parametrize(("name", "flags"), RUNS)
def test_it_runs_and_learns(name: str, flags: list[str], tmp_path: Path) -> None:
    script = ROOT / "launch" / "examples" / f"{name}.py"
    done = launch_script("torchrun", tmp_path, script, *flags, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    found = re.search(r"^loss: (\S+) -> (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    assert float(found[2]) < 0.95 * float(found[1])
    if name in PRESETS:
        active = re.search(r"^weights active in backward: (\d+)%", done.stdout, re.MULTILINE)
        assert active, done.stdout[-2000:]
        assert 0 < int(active[1]) < 100


def test_there_are_examples() -> None:
    assert {"accelerate_fsdp2", "deepspeed_loop", "trainer"} < {script.stem for script in EXAMPLES}
