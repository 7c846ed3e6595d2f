"""The command: what a step of each candidate takes under ZeRO-2 on two ranks, in seconds and in memory.

Losses of the long tasks depend neither on the engine nor on the number of ranks. So their runs are made in one process,
and their time and memory under ZeRO-2 are those of steps on a Llama of equal blocks, measured here once.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.evidence.candidates import CANDIDATES, Candidate
from benchmarks.measure import Effort, Measured, ratio, ratio_range, run_together
from benchmarks.modes import ADAMW_MODE, Mode
from benchmarks.results import describe_machine
from benchmarks.setup import Setup

FILE = "step_costs.json"
SETUP = Setup(blocks=8, hidden=256, vocabulary=2048, batch=2, length=64, accumulation=4)
_WARM_UP, _COUNTED = 4, 3


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of a step, on average over steps; stock AdamW's is 1.

    Attributes:
        time: Seconds.
        low: Where `time` lies in 9 of 10 runs: from here,
        high: to here.
        memory: Weights, optimizer state and the highest that a step takes beside them, in the dearest of some steps.
    """

    time: float
    low: float
    high: float
    memory: float


def read_costs(folder: Path) -> dict[str, StepCost]:
    """By candidate; nothing where none were measured."""
    path = folder / FILE
    if not path.is_file():
        return {}
    return {name: StepCost(**cost) for name, cost in json.loads(path.read_text(encoding="utf-8"))["costs"].items()}


def measure(candidates: Sequence[Candidate], rounds: int) -> dict[str, StepCost]:
    """All in turn, in the same two ranks."""
    modes = [ADAMW_MODE, *(Mode(name=one.name, knobs={"rho": one.rho, **one.knobs}) for one in candidates)]
    effort = Effort(warmup=_WARM_UP, rounds=rounds, counted=_COUNTED)
    ((found, num_weights),) = run_together([SETUP], modes, effort)
    by_name = {one.mode: one for one in found}
    adamw = by_name.pop(ADAMW_MODE.name)
    weights = num_weights * SETUP.torch_dtype.itemsize
    return {name: _cost(one, adamw, weights) for name, one in by_name.items()}


def _cost(ours: Measured, adamw: Measured, weights: int) -> StepCost:
    low, high = ratio_range(ours.seconds, adamw.seconds)
    held = [weights + one.optimizer + max(one.peak) for one in (ours, adamw)]
    return StepCost(time=ratio(ours.seconds, adamw.seconds), low=low, high=high, memory=held[0] / held[1])


def can_be_measured(candidate: Candidate) -> bool:
    """Not what changes over a run: a few steps do not show it. Nor adapters, whose model is another."""
    when = candidate.knobs.get("ascend_when")
    return candidate.lora == 0 and not (isinstance(when, Mapping) and "last" in when)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    names = [name for name, candidate in CANDIDATES.items() if can_be_measured(candidate)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.step_costs", description=__doc__)
    parser.add_argument("--candidates", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="steps of each on the clock")
    parser.add_argument("--output", type=Path, default=Path("docs/evidence"), metavar="DIR")
    options = parser.parse_args(arguments)
    costs = measure([CANDIDATES[name] for name in options.candidates], options.rounds)
    known = read_costs(options.output) | costs
    written = {
        "setup": SETUP.describe(),
        "machine": describe_machine(),
        "costs": {name: asdict(known[name]) for name in CANDIDATES if name in known},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / FILE
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"Costs: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
