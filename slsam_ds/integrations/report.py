"""What a run says about itself when it ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slsam_ds.records import LAYERS_FILE, STEPS_FILE

_BAR = 24  # characters of the longest bar
_MAX_ROWS = 18  # more layers than that go into two columns


def summarize(
    layers: Sequence[dict[str, Any]],
    steps: Sequence[dict[str, Any]],
    *,
    held_out: tuple[float, float] | None,
    held_out_title: str,
    output_dir: str | Path,
) -> str:
    """The end of a run as text.

    Args:
        layers: The records of `slsam_layers.json`.
        steps: The records of `slsam_steps.jsonl`.
        held_out: Held-out loss before and after; None: not measured.
        held_out_title: What it was measured on.
        output_dir: Where the files are.
    """
    lines = [""]
    if held_out is not None:
        before, after = held_out
        change = f"{100 * (after - before) / before:+.1f}%" if before else ""
        lines.append(f"Held-out loss ({held_out_title}): {before:.4f} before, {after:.4f} after ({change})")
    if steps and layers:
        total = sum(layer["numel"] for layer in layers)
        share = sum(sum(layers[arm]["numel"] for arm in step["active"]) for step in steps) / len(steps) / total
        mean_active = sum(len(step["active"]) for step in steps) / len(steps)
        lines += [
            f"Active parameters: {100 * share:.1f}% of {total:,} per step; {mean_active:.3g} of {len(layers)} layers",
            *_perturbation(steps),
            f"Layers active, in how many of {len(steps)} steps:",
            *_chart(layers, steps),
        ]
    files = f"model, {LAYERS_FILE}, {STEPS_FILE}"
    lines.append(f"Outputs: {Path(output_dir)} ({files})")
    return "\n".join(lines)


def _perturbation(steps: Sequence[dict[str, Any]]) -> list[str]:
    projections = [step["perturbation_projection"] for step in steps if step["perturbation_projection"] is not None]
    skipped = sum(bool(step["skipped"]) for step in steps)
    lines = []
    if projections:
        mean = sum(projections) / len(projections)
        lines.append(f"Perturbation: {mean:.3f} of rho = {steps[-1]['rho']:g} reached the weights (1: all of it)")
    if skipped:
        lines.append(f"Skipped: {skipped} of {len(steps)} steps, because a loss or gradient was not finite")
    return lines


def _chart(layers: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> list[str]:
    counts = [0] * len(layers)
    for step in steps:
        for arm in step["active"]:
            counts[arm] += 1
    two_columns = len(layers) > _MAX_ROWS
    width = _BAR // 2 if two_columns else _BAR
    longest = max(len(layer["name"]) for layer in layers)
    digits = len(str(max(counts)))
    rows = []
    for layer, count in zip(layers, counts, strict=True):
        bar = "█" * max(round(width * count / max(counts)), 1 if count else 0)
        rows.append(f"  {layer['name']:<{longest}} {count:>{digits}} {bar:<{width}}")
    if two_columns:
        half = (len(rows) + 1) // 2
        rows = [f"{left}{right}" for left, right in zip(rows[:half], [*rows[half:], ""], strict=False)]
    return [row.rstrip() for row in rows]
