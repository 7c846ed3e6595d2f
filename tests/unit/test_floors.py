"""Imports point down only, and the cheap import stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "slsam_ds"
ENGINE_ROOM = {"deepspeed", "torch.distributed"}
# Thin, like launch/: what they run is in cli.
ENTRIES = {"__main__", "compare", "doctor", "estimate/__main__", "recipes/__main__", "run", "settings", "train"}
COMPOSITION = {"__init__", "assembly", "initialization", "public", "slsam", "state/checkpoint", "stock_loop"}
CHOICES = {"combinations", "directions", "masks", "metrics", "recipes", "schedules", "selectors"}
PURE_ROOMS = CHOICES | {"model", "pricing", "records", "state"}
FRAMEWORKS = {"transformers", "trl", "accelerate", "peft", "datasets"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    name = str(relative.with_suffix(""))
    if name in ENTRIES:
        return "launch"
    if name in COMPOSITION:
        return "slsam"
    if len(relative.parts) > 1:
        return "pure" if relative.parts[0] in PURE_ROOMS else relative.parts[0]
    return "step" if name in ("step", "passes", "trial") else "pure"


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it; `torch.distributed.x` where it is reached through torch."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def reaches(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


ALLOWED = {
    "pure": {"pure"},
    "step": {"pure", "step"},
    "engines": {"pure", "engines"},
    "report": {"pure", "report"},
    "estimate": {"pure", "estimate"},
    "slsam": {"pure", "step", "engines", "slsam"},
    "integrations": {"pure", "step", "engines", "slsam", "integrations"},
    "cli": {"pure", "step", "engines", "slsam", "report", "estimate", "integrations", "cli"},
    "launch": {"cli"},
}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = floor(path)
    for name in imported(path):
        target = PACKAGE.parent.joinpath(*name.split("."))
        files = [path for path in (target.with_suffix(".py"), target / "__init__.py") if path.is_file()]
        if name.startswith("slsam_ds.") and files:
            assert floor(files[0]) in ALLOWED[here], f"{here} imports {name}"
        assert here in ("engines", "integrations", "cli") or not reaches(name, ENGINE_ROOM), f"{here} imports {name}"
        assert here in ("integrations", "cli") or not reaches(name, FRAMEWORKS), f"{here} imports {name}"


def test_imports_run_in_no_circle() -> None:
    dotted = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in modules()}
    names = {name.removesuffix(".__init__"): path for path, name in dotted.items()}
    graph = {name: {other for other in imported(path) if other in names} for name, path in names.items()}
    TopologicalSorter(graph).prepare()


def test_importing_the_package_loads_no_framework() -> None:
    heavy = {"deepspeed", "transformers", "datasets"}
    check = f"from slsam_ds import *; import sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
