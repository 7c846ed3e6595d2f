"""What slsam_ds touches of DeepSpeed's insides is in the tables that are checked at construction."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slsam_ds.engines.deepspeed import internals
from slsam_ds.engines.deepspeed.internals import INTERNALS, WRITTEN, Internals, check_internals, check_version

ROOM = Path(internals.__file__).parent


def touched(path: Path) -> Iterator[str]:
    """Private attributes of other objects than `self`, and what ZeRO-3 notes on parameters."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            own = ast.unparse(node.value) in ("self", "super()")
            private = node.attr.startswith("_") and not node.attr.startswith("__") and not own
            if (private and not node.attr.startswith("_foreach_")) or node.attr.startswith("ds_"):  # those are torch's
                yield node.attr


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_every_private_name_is_in_a_table(path: Path) -> None:
    known = {part for table in INTERNALS.values() for name in tables_names(table) for part in name.split(".")}
    assert {name for name in touched(path) if name not in OURS} - known - set(WRITTEN) == set()


OURS = {"_target", "_timeout"}  # of torch and of the standard library


def tables_names(table: Internals) -> list[str]:
    return [
        *table.lists,
        *table.dicts,
        *table.offloaded_lists,
        *table.offloaded_dicts,
        *table.names,
        *table.offloaded_names,
        *table.keys,
    ]


def holder(name: str, **changes: Any) -> Any:
    """As an object of the class would look."""
    table, made = INTERNALS[name], SimpleNamespace()
    for path in (*table.names, *table.offloaded_names):
        target = made
        *parents, last = path.split(".")
        for parent in parents:
            target = vars(target).setdefault(parent, SimpleNamespace())
        vars(target).setdefault(last, None)
    vars(made).update({each: [1, 2] for each in (*table.lists, *table.offloaded_lists)})
    vars(made).update({each: {} for each in (*table.dicts, *table.offloaded_dicts)}, **changes)
    return made


@pytest.mark.parametrize("name", INTERNALS)
def test_whatever_is_missing_is_named(name: str) -> None:
    check_internals(holder(name), name, offloaded=True)
    for path in tables_names(INTERNALS[name]):
        if path in INTERNALS[name].keys or not INTERNALS[name].exists(path):
            continue
        lacking = holder(name)
        *parents, last = path.split(".")
        target = lacking
        for parent in parents:
            target = vars(target)[parent]
        del vars(target)[last]
        with pytest.raises(ValueError, match=last):
            check_internals(lacking, name, offloaded=True)


def test_lists_per_group_have_as_many_entries_as_there_are_groups() -> None:
    with pytest.raises(ValueError, match=r"fp32_groups is not the list per group"):
        check_internals(holder("FP16_UnfusedOptimizer", fp32_groups=[1]), "FP16_UnfusedOptimizer")


def test_a_name_may_be_of_some_versions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Internals(source="", lists=("old", "always", "new"), since={"new": (0, 19, 9)}, until={"old": (0, 19, 9)})
    monkeypatch.setattr("deepspeed.__version__", "0.19.8")
    assert table.group_lists(offloaded=False) == ["old", "always"]
    monkeypatch.setattr("deepspeed.__version__", "0.19.10+cpu")
    assert table.group_lists(offloaded=False) == ["always", "new"]


@pytest.mark.parametrize("version", ["0.18.5", "0.20.0", "1.0"])
def test_an_unknown_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.__version__", version)
    with pytest.raises(ValueError, match=rf"supports deepspeed >=0\.18\.6,<0\.20; found {version}"):
        check_version()
