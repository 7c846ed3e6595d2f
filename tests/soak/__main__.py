"""What a run survives, counted: `make soak`, or `python -m tests.soak`. Writes the table of docs/reliability.md."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch

from tests.soak.bad_numbers import count_bad_numbers
from tests.soak.early_ends import a_full_disk, a_kill, count_endings
from tests.soak.long_run import run_long
from tests.soak.tables import write_tables

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
RESULTS = DOCUMENT.with_suffix(".json")
SECTIONS = ("kills", "full_disk", "bad_numbers", "bad_inputs", "long_run")


def main() -> None:
    """Parse, inject faults row by row, write each one's counts when they are there."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--kills", type=int, default=200, help="over all engines (default: %(default)s)")
    parser.add_argument("--full-disks", type=int, default=30, help="over all engines (default: %(default)s)")
    parser.add_argument("--bad-numbers", type=int, default=100, help="on each engine (default: %(default)s)")
    parser.add_argument("--bad-inputs", type=int, default=1000, help="of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="of the long run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    kills, full_disks = (-(-each // len(given.engines)) for each in (given.kills, given.full_disks))
    sections: dict[str, dict[str, Callable[[], Any]]] = {
        "kills": {name: partial(count_endings, name, kills, a_kill, seed=given.seed) for name in given.engines},
        "full_disk": {
            name: partial(count_endings, name, full_disks, a_full_disk, seed=given.seed) for name in given.engines
        },
        "bad_numbers": {name: partial(count_bad_numbers, name, given.bad_numbers) for name in given.engines},
        "bad_inputs": {"": partial(_count_bad_inputs, given.bad_inputs)},
        "long_run": {"zero2": partial(run_long, given.steps, seed=given.seed)},
    }
    for name in given.only:
        for row, measure in sections[name].items():
            print(f"{name} {row} ...", flush=True)
            started = time.monotonic()
            counts = measure()
            _add(name, counts if row == "" else {row: counts}, round(time.monotonic() - started))
            print(json.dumps(counts), flush=True)


def _add(section: str, counts: dict[str, Any], seconds: int) -> None:
    """Put rows into a section's results, in place of those of the same names."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    merged = found.get(section, {"counts": {}})["counts"]
    merged |= {row: {**values, "seconds": seconds} for row, values in counts.items()}
    found[section] = {
        "counts": dict(sorted(merged.items())),
        "machine": f"{platform.machine()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}",
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_tables(DOCUMENT, found)


def _count_bad_inputs(examples: int) -> dict[str, dict[str, int]]:
    from tests.bad_inputs import count

    return count(examples)


if __name__ == "__main__":
    main()
