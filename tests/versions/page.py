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

This page lists the versions of other packages that `slsam_ds` was tested with. `make test-versions` writes it. For each
row of `tests/versions/rows.toml`, it creates an environment, installs the package with its own version ranges and the
row's pins, and runs two groups of tests: those that compare the engines with the reference (1e-6), and those of
Trainer, TRL and Accelerate. `make test` runs all tests with the versions of `constraints.txt`.

The ranges in `pyproject.toml` begin with the row `oldest`, because only tested versions are supported. DeepSpeed's
range is also checked when an engine is built, because its private structures differ from version to version.
`slsam_ds/engines/deepspeed/internals.py` says which names a version has.

"""
TAIL = """
## What was not run

transformers below 5.6 was not run in full. With 5.2 the tests of Trainer and LLaMA-Factory's `sft`, `dpo` and `rm`
passed by hand after two changes: the norm was logged elsewhere, and Accelerate was kept from dividing gradients by the
number of micro-batches a second time. `python -m slsam_ds.estimate` and `--help_all` end with an error there. 4.57
calls a Trainer's methods in another order.

Versions within the range differ in these ways:

- Before 5.11, transformers divides a causal model's loss by the number of all labels. This includes the first label of
  a sample, which is never predicted.
- Before 5.15, transformers adds up the smoothed losses of micro-batches without dividing them.
- Before 5.10, `--fsdp` needs a value (`--fsdp full_shard`).
- Before accelerate 1.13, ranks on the CPU are counted without `use_cpu=True`.

TRL 0.24 alone does not work with these versions of transformers. It believes that mergekit is installed, and its
DPOTrainer and GRPOTrainer require `warnings_issued` of a model. LLaMA-Factory works around the first problem and avoids
the second. The tests do the same (`tests/old_trl.py`). TRL 1.9 needs no workaround.

Every row has the same torch, because no other CPU build was available. The minimum of torch 2.8 comes from reading its
code: the functions of torch that are used on one device and under DeepSpeed exist in 2.6 already. FSDP2 needs torch
2.13, which can be told to reduce gradients that a rank has not used. It raises an error with older versions.

## Why DeepSpeed is a dependency and not an extra

Your own loop on one device or with FSDP2 does not need DeepSpeed, and `import slsam_ds` does not load it. But `pip
install slsam-ds` has to be enough for `deepspeed launch/train.py`, which most users run first. Python packages have no
extra that is on by default. Two ways to install would also mean two kinds of errors to explain.
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
