"""`python -m tests.touched [BASE]`: the test files nearest to what has changed since BASE (HEAD, where not given).

Near is what imports a changed module, or what imports an importer, and so on until some test does; and what is named
after the module or its folder. The unit tests, where nothing has changed or so much is near that it would take minutes.
"""

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("slsam_ds", "tests", "benchmarks", "launch")
UNIT_TESTS = "tests/unit"
MOST = 6
"""Test files that are run; more take minutes."""


def changed_files(base: str) -> set[str]:
    """Paths under the root that differ from a commit, those that git does not know yet included."""
    found: set[str] = set()
    for command in (["diff", "--name-only", base], ["ls-files", "--others", "--exclude-standard"]):
        done = subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True, text=True)
        found |= set(done.stdout.splitlines())
    return found


def imports() -> dict[str, set[str]]:
    """Of every Python file, by path under the root: the paths of ours that it imports, anywhere in it."""
    files = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return {file: {path for name in _names(ROOT / file) for path in _paths(name) if path in files} for file in files}


def nearest_tests(changed: Collection[str], imported: Mapping[str, Collection[str]]) -> list[str]:
    """Test files that have changed, and for each other file that has, those that are near."""
    tests = set(filter(_is_test, imported))
    found = tests & set(changed)
    for file in set(changed) & imported.keys() - found:
        near, seen = {file}, {file}
        while near and not near & tests:
            near = {importer for importer, names in imported.items() if near & set(names)} - seen
            seen |= near
        names = {Path(file).stem, Path(file).parent.name}
        named = {test for test in tests if any(f"{Path(test).stem}_".startswith(f"test_{name}_") for name in names)}
        found |= near & tests | named
    return sorted(found)


def _is_test(file: str) -> bool:
    return Path(file).name.startswith("test_")


def _names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _paths(name: str) -> tuple[str, str]:
    path = name.replace(".", "/")
    return f"{path}.py", f"{path}/__init__.py"


if __name__ == "__main__":
    nearest = nearest_tests(changed_files(sys.argv[1] if len(sys.argv) > 1 else "HEAD"), imports())
    print(*(nearest if 0 < len(nearest) <= MOST else [UNIT_TESTS]))
