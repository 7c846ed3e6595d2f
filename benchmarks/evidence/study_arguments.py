"""The flags that the commands of the long study share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.candidates import CANDIDATES
from benchmarks.evidence.long_tasks import LONG_TASKS


def study_parser(command: str, description: str | None, *, candidates: Sequence[str]) -> argparse.ArgumentParser:
    """Tasks, candidates, where the results are, and how to compute them.

    Args:
        command: The module's name.
        description: What the command does.
        candidates: Those that are taken where none is named.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.evidence.{command}", description=description)
    parser.add_argument("--tasks", nargs="+", choices=LONG_TASKS, metavar="TASK", default=list(LONG_TASKS))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, metavar="NAME", default=list(candidates))
    parser.add_argument("--output", type=Path, default=Path("docs/evidence"), metavar="DIR")
    parser.add_argument("--tables-only", action="store_true", help="make no runs, write the report again")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch")
    return parser
