"""What a run survives, counted: `make soak`, or `python -m tests.soak`. Writes the table of docs/reliability.md."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from tests.soak.bad_numbers import count_bad_numbers
from tests.soak.kills import count_kills
from tests.soak.long_run import run_long
from tests.soak.tables import write_tables

ENGINES = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
RESULTS = DOCUMENT.with_suffix(".json")
SECTIONS = ("kills", "bad_numbers", "bad_inputs", "long_run")


def main() -> None:
    """Parse, inject faults section by section, write each one's counts when they are there."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--kills", type=int, default=200, help="over all engines (default: %(default)s)")
    parser.add_argument("--bad-numbers", type=int, default=100, help="on each engine (default: %(default)s)")
    parser.add_argument("--bad-inputs", type=int, default=1000, help="of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="of the long run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    each = -(-given.kills // len(given.engines))
    sections: dict[str, Callable[[], Any]] = {
        "kills": lambda: {engine: count_kills(engine, each, seed=given.seed) for engine in given.engines},
        "bad_numbers": lambda: {
            engine: count_bad_numbers(engine, given.bad_numbers, seed=given.seed) for engine in given.engines
        },
        "bad_inputs": lambda: _count_bad_inputs(given.bad_inputs),
        "long_run": lambda: {"zero2": run_long(given.steps, seed=given.seed)},
    }
    for name in given.only:
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        counts = sections[name]()
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        found[name] = {"counts": counts, "seconds": round(time.monotonic() - started), "machine": _machine()}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_tables(DOCUMENT, found)
        print(json.dumps(counts), flush=True)


def _count_bad_inputs(examples: int) -> dict[str, dict[str, int]]:
    from tests.bad_inputs import count

    return count(examples)


def _machine() -> str:
    return f"{platform.machine()}, torch {torch.__version__}, deepspeed {deepspeed.__version__}"


if __name__ == "__main__":
    main()
