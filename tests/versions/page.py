"""docs/versions.md, whole: what `make test-versions` found, and what it means."""

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "python",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "safetensors",
    "numpy",
)
HEAD = """# Versions

What is installed beside `slsam_ds` and was tested with it. `make test-versions` writes this page: it makes an
environment for each row of `tests/versions/rows.toml`, installs the package by its own ranges beside the row's pins,
and runs the tests of the engines against the reference (1e-6), and those of Trainer, TRL and Accelerate. With the
versions of `constraints.txt`, `make test` runs everything.

The ranges in `pyproject.toml` begin with the row `oldest`: a version is promised once it has been tried. DeepSpeed's
range is also checked when an engine is built, because its private structures differ from version to version;
`slsam_ds/engines/deepspeed/internals.py` says which names a version has.

"""
TAIL = """
## What was not run

transformers below 5.6. With 5.2 the tests of Trainer and LLaMA-Factory's `sft`, `dpo` and `rm` passed by hand, once the
norm was logged elsewhere and Accelerate kept from dividing gradients by the micro-batches a second time, as it does
there; but `python -m slsam_ds.estimate` and `--help_all` end with an error. 4.57 calls a Trainer's methods in another
order.

What differs within the range: before 5.11, transformers divides a causal model's loss by the number of all labels, the
first of a sample included, which is never predicted; before 5.15, it adds up smoothed losses of micro-batches without
dividing them; before 5.10, `--fsdp` wants a value (`--fsdp full_shard`); before accelerate 1.13, ranks on the CPU are
counted without `use_cpu=True`.

TRL 0.24 by itself does not fit these versions of transformers: it takes mergekit for installed, and its own DPOTrainer
and GRPOTrainer want `warnings_issued` of a model. LLaMA-Factory helps it to import and does without the other; the
tests do the same (`tests/old_trl.py`). TRL 1.9 needs no help.

Every row has the same torch: other builds for the CPU were not to be had. torch 2.8 is the floor by reading: what is
used of torch on one device and under DeepSpeed is in 2.6 already. FSDP2 needs torch 2.13, where it can be told to
reduce what a rank has not used, and is refused with a sentence below that.

## Why DeepSpeed is a dependency and not an extra

A loop of one's own on one device or with FSDP2 does without it, and `import slsam_ds` does not load it. But
`pip install slsam-ds` has to be enough for `deepspeed launch/train.py`, which is the first thing that people do with
this package, and Python packages have no extra that is on unless it is switched off. Two ways to install would also
mean two kinds of errors to explain.
"""


def as_page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        found: By row: its date, versions, number of tests that passed, and names of those that failed.
    """
    lines = [f"| | {' | '.join(COLUMNS)} | passed | failed | date |", "|---|" + "---|" * (len(COLUMNS) + 3)]
    for name, row in found.items():
        versions = [row["versions"].get(column, "") for column in COLUMNS]
        cells = [name, *versions, row["passed"], len(row["failed"]), row["date"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    failures = [
        f"- {name}: {', '.join(f'`{test}`' for test in row['failed'])}" for name, row in found.items() if row["failed"]
    ]
    return HEAD + "\n".join(lines) + "\n" + ("\nFailed:\n\n" + "\n".join(failures) + "\n" if failures else "") + TAIL
