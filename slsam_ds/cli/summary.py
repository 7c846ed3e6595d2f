"""What a run says about itself when it ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slsam_ds.records.files import LAYERS_FILE, STEPS_FILE
from slsam_ds.report.facts import facts_as_text, layer_facts
from slsam_ds.report.history import RunHistory

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
        history = RunHistory.from_records(layers, steps)
        title = "Layers updated, and perturbed" if history.perturbs_others else "Layers active"
        lines += [*facts_as_text(history), f"{title}, in how many of {len(steps)} steps:", *_chart(history)]
    lines.append(f"Outputs: {Path(output_dir)} (model, {LAYERS_FILE}, {STEPS_FILE})")
    if steps:
        lines.append(f"Pictures of the run: slsam report {Path(output_dir)}")
    return "\n".join(lines)


def _chart(history: RunHistory) -> list[str]:
    layers = layer_facts(history)
    most = max(layer.num_active for layer in layers)
    two_columns = len(layers) > _MAX_ROWS
    width = _BAR // 2 if two_columns else _BAR
    longest = max(len(layer.name) for layer in layers)
    digits = len(str(len(history)))
    rows = []
    for layer in layers:
        bar = "█" * max(round(width * layer.num_active / most), 1 if layer.num_active else 0)
        perturbed = f" {layer.num_perturbed:>{digits}}" if history.perturbs_others else ""
        rows.append(f"  {layer.name:<{longest}} {layer.num_active:>{digits}}{perturbed} {bar:<{width}}")
    if two_columns:
        half = (len(rows) + 1) // 2
        rows = [f"{left}{right}" for left, right in zip(rows[:half], [*rows[half:], ""], strict=False)]
    return [row.rstrip() for row in rows]
