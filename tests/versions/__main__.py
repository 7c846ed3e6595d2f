"""Tests with other versions of what is installed beside the package: `make test-versions`. Writes docs/versions.md."""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.versions.page import as_page

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("rows.toml")
ENVIRONMENTS = ROOT / ".venv-versions"
DOCUMENT = ROOT / "docs" / "versions.md"
RESULTS = DOCUMENT.with_suffix(".json")
TESTS = (
    "tests/distributed/test_reference.py",
    "tests/integration/test_accelerate.py",
    "tests/integration/test_trainer.py",
    "tests/integration/test_trl.py",
    "tests/unit/test_internals.py",
)


def main() -> None:
    """Parse, then install and test row by row; write each one's result when it is there."""
    rows: dict[str, dict[str, str]] = tomllib.loads(ROWS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=rows, default=list(rows))
    all_passed = True
    for name in parser.parse_args().only:
        print(f"{name} ...", flush=True)
        python = install(name, rows[name])
        result = run_tests(python, ENVIRONMENTS / f"{name}.xml")
        add(name, result, list(rows))
        print(json.dumps(result), flush=True)
        all_passed &= not result["failed"]
    sys.exit(not all_passed)


def install(name: str, pins: Mapping[str, str]) -> Path:
    """Make a row's environment as `make install` makes .venv.

    Returns:
        Its interpreter.
    """
    ENVIRONMENTS.mkdir(exist_ok=True)
    constraints = ENVIRONMENTS / f"{name}.txt"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = [line for line in pinned if line.startswith("torch==")]
    constraints.write_text("\n".join([*torch, *(f"{package}=={pin}" for package, pin in pins.items())]) + "\n")
    environment = ENVIRONMENTS / name
    arguments = [f"VENV={environment.relative_to(ROOT)}", f"CONSTRAINTS={constraints.relative_to(ROOT)}"]
    subprocess.run(["make", "install", *arguments], cwd=ROOT, check=True)
    return environment / "bin" / "python"


def run_tests(python: Path, report: Path) -> dict[str, Any]:
    """Run the tests in an environment.

    Returns:
        What is written down of it.
    """
    variables = {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "torch_extensions"),
    }
    workers = ["--numprocesses", "2", "--dist", "loadfile"]
    command = [python, "-m", "pytest", "-m", "not slow", f"--junitxml={report}", *workers, *TESTS]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env=variables, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {case.attrib["name"] for case in cases if {"failure", "error"} & {child.tag for child in case}}
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": python_version(python), **installed(python)},
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": sorted(bad),
    }


def python_version(python: Path) -> str:
    """Of the interpreter of an environment."""
    return _output(python, "-c", "import platform; print(platform.python_version())").strip()


def installed(python: Path) -> dict[str, str]:
    """The versions in an environment, by canonical name."""
    listed = json.loads(_output(python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"))
    return {re.sub(r"[-_.]+", "-", each["name"]).lower(): each["version"] for each in listed}


def add(name: str, result: Mapping[str, Any], order: Sequence[str]) -> None:
    """Put a row into the results, in place of the one of its name, and write the table."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found[name] = result
    found = {row: found[row] for row in order if row in found}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(as_page(found), encoding="utf-8")


def _output(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
