"""The Markdown report: made again from the results on disk after every section."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.acceptance import acceptance_table
from benchmarks.breakdown import PARTS
from benchmarks.engine_costs import QUANTITIES
from benchmarks.results import load
from benchmarks.rows import rows

REPORT = "README.md"

_INTRODUCTION = """# Benchmarks

`python -m benchmarks` (`make bench` on the CPU) writes this page; do not edit it. The JSON file of each section has the
raw numbers. Every mode trains its own model in the same processes. A round takes one step of each mode in a new random
order, so that other load on the machine affects all modes alike. Ratios of times are ratios of means, with the range of
9 in 10 random resamples of the rounds. **AdamW is the engine without `slsam_ds`**. FLOPs are relative to AdamW's. They
are those of the timed steps, by the price list that `slsam_ds` counts on this model.
"""


def write_report(folder: Path) -> Path:
    """Report and pictures from whatever sections there are.

    Returns:
        The report's path.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    results = {name: result for name in SECTIONS if (result := load(folder, name)) is not None}
    found = {name: result["found"] for name, result in results.items()}
    parts = [_INTRODUCTION, "## Targets\n\nValues in bold miss their target.\n\n" + acceptance_table(found)]
    for name, result in results.items():
        title, render = SECTIONS[name]
        where = f"`{result['command']}`, {result['date']}, {result['seconds']} s; {result['machine']}"
        parts.append(f"## {title}\n\n{render(result['found'], folder)}\n\n{where}")
    path = folder / REPORT
    path.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return path


def _comparison(found: Mapping[str, Any], folder: Path, picture: str) -> str:
    from benchmarks.figures import draw_comparison

    draw_comparison(folder / picture, found)
    about = f"{found['about']}; {found['weights'] / 1e6:.1f}M weights."
    steps = len(found["groups"][0][0]["seconds"])
    parts = [f"{about} {steps} rounds.", _times(found), f"![{picture}]({picture})"]
    if found["groups"][0][0]["counted_flops"]:
        parts += [_memory(found), _check_of_prices(found)]
    return "\n\n".join(parts)


def _times(found: Mapping[str, Any]) -> str:
    lines = [
        "| mode | s per step, median (quartiles) | time / AdamW | time / dense SAM | FLOPs / AdamW | time over FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows(found):
        low, middle, high = statistics.quantiles(one.one.seconds, n=4)
        least, most = one.time_range
        lines.append(
            f"| {one.one.mode} | {middle:.3g} ({low:.3g}-{high:.3g}) | {one.time:.2f} ({least:.2f}-{most:.2f}) | "
            f"{one.time_to_dense:.2f} | {one.flops:.2f} | {one.excess:.2f} |"
        )
    return "\n".join(lines)


def _memory(found: Mapping[str, Any]) -> str:
    """What each mode holds and sends, on one rank."""
    lines = [
        "MB on one rank: the largest value over the counted steps, and means for bytes sent. Activations are what "
        "autograd saves of a micro-batch. Gradients are those held at one time (for AdamW by the size of the engine's "
        "buckets). The optimizer's state includes master weights. The rise is that of all memory within a step, "
        "including DeepSpeed's buckets.",
        "",
        "| mode | activations | gradients | both / AdamW | optimizer | rise in a step | reduced | gathered |",
        "|" + "---|" * 8,
    ]
    for one in rows(found):
        of = one.one
        held = one.held(of) / one.held(one.adamw)
        sent = [statistics.mean(kind) for kind in (of.reduce, of.gather)]
        cells = [max(of.activations), max(of.gradients), held, of.optimizer, max(of.peak), *sent]
        texts = [f"{cell:.2f}" if cell is held else f"{cell / 1e6:.3g}" for cell in cells]
        lines.append(f"| {of.mode} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _check_of_prices(found: Mapping[str, Any]) -> str:
    checked = [one for one in rows(found) if one.deviation is not None]
    worst = max(checked, key=lambda one: one.deviation or 0.0)
    steps = sum(len(one.one.counted_flops) for one in checked)
    return (
        f"The price list was compared with torch's FLOP counter over {steps} whole steps. The largest difference is "
        f"{worst.deviation:.1e} of a step of AdamW ({worst.one.mode})."
    )


def _fine_tuning(found: Mapping[str, Any], folder: Path) -> str:
    text = _comparison(found, folder, "fine_tuning.png")
    lines = ["", "", "| mode | mean training loss, first half | second half |", "|---|---|---|"]
    for one in rows(found):
        half = len(one.one.losses) // 2
        first, second = (statistics.mean(part) for part in (one.one.losses[:half], one.one.losses[half:]))
        lines.append(f"| {one.one.mode} | {first:.3f} | {second:.3f} |")
    return text + "\n".join(lines)


def _profile(found: Mapping[str, Any], folder: Path) -> str:
    from benchmarks.figures import draw_breakdown

    draw_breakdown(folder / "profile.png", found)
    modes = found["modes"]
    whole = modes["AdamW"]["seconds"]["all"]
    lines = [
        f"{found['about']}. Values are seconds in % of AdamW's step. AdamW's backward includes the reduction. "
        "Reductions and statistics include waiting for the other ranks. "
        '"Rest" is selection, perturbing and restoring, and barriers.',
        "",
        f"| part | {' | '.join(modes)} |",
        "|---|" + "---|" * len(modes),
    ]
    for part in (*PARTS, "all"):
        cells = [mode["seconds"][part] for mode in modes.values()]
        if any(cells):
            lines.append(f"| {part} | " + " | ".join(f"{100 * cell / whole:.1f}" for cell in cells) + " |")
    lines.append("| FLOPs | " + " | ".join(f"{100 * mode['flops']:.1f}" for mode in modes.values()) + " |")
    return "\n".join([*lines, "", "![profile](profile.png)"])


def _sweeps(found: Mapping[str, Any], folder: Path) -> str:
    from benchmarks.figures import draw_sweeps

    draw_sweeps(folder / "sweeps.png", found)
    titles = {"active": "active", "blocks": "layers", "world_size": "ranks", "window": "micro-batches"}
    parts = [f"SL-SAM, uniform, against AdamW. By default: {found['about']}.", "![sweeps](sweeps.png)"]
    for name, title in titles.items():
        lines = [
            f"| {title} | width | M weights | AdamW, s | time / AdamW | FLOPs / AdamW | bytes / AdamW |",
            "|" + "---|" * 7,
        ]
        for point in found[name]:
            value = f"{point['value']:.0%}" if name == "active" else f"{point['value']}"
            low, high = point["time_range"]
            sent = "none" if point["bytes"] is None else f"{point['bytes']:.2f}"
            lines.append(
                f"| {value} | {point['hidden']} | {point['weights'] / 1e6:.1f} | {point['adamw_seconds']:.3g} | "
                f"{point['time']:.2f} ({low:.2f}-{high:.2f}) | {point['flops']:.2f} | {sent} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _engines(found: Mapping[str, Any], folder: Path) -> str:
    lines = [
        f"A step of {found['active']:.0%} of {found['blocks']} layers (width {found['hidden']}) is compared with a "
        f"step of all layers on the same engine: two passes each, two ranks, {found['steps']} steps.",
        "",
        f"| engine | {' | '.join(f'{quantity}, MB (share of dense)' for quantity in QUANTITIES)} | all traffic |",
        "|---|" + "---|" * (len(QUANTITIES) + 1),
    ]
    for engine, (sparse, dense) in found["engines"].items():
        cells = [
            f"{sparse[name] / 1e6:.3g} ({sparse[name] / dense[name]:.2f})" if dense[name] else "none"
            for name in QUANTITIES
        ]
        total = sum(sparse[kind] for kind in ("reduce", "gather")) / sum(dense[kind] for kind in ("reduce", "gather"))
        lines.append(f"| {engine} | {' | '.join(cells)} | {total:.2f} |")
    return "\n".join(lines)


def _traffic(found: Mapping[str, Any], folder: Path) -> str:
    lines = [
        "This section runs the layers of the comparison at half the width on the engines that shard weights. The width "
        "does not change the shares of bytes. Bytes are counted after a warm-up, in which ZeRO-3 learns the order of "
        "its fetches for each lowest layer.",
        "",
        "| engine | mode | reduced, MB | gathered, MB | all / AdamW | all / dense SAM |",
        "|---|---|---|---|---|---|",
    ]
    for engine, comparison in found.items():
        for one in rows(comparison):
            reduced, gathered = (statistics.mean(kind) / 1e6 for kind in (one.one.reduce, one.one.gather))
            lines.append(
                f"| {engine} | {one.one.mode} | {reduced:.3g} | {gathered:.3g} | {one.sent_to_adamw:.2f} | "
                f"{one.sent_to_dense:.2f} |"
            )
    return "\n".join(lines)


SECTIONS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Path], str]]] = {
    "comparison": ("Side by side", lambda found, folder: _comparison(found, folder, "comparison.png")),
    "short_steps": (
        "Side by side, short steps",
        lambda found, folder: (
            "This section uses half of the tokens, so communication takes a larger share of the time.\n\n"
            + _comparison(found, folder, "short_steps.png")
        ),
    ),
    "fine_tuning": ("A real fine-tuning task, with the bandit", _fine_tuning),
    "profile": ("Where the time goes", _profile),
    "sweeps": ("Sweeps", _sweeps),
    "engines": ("What a step costs on each engine", _engines),
    "traffic": ("Bytes where weights are sharded", _traffic),
}
"""Title and text by section, in their order."""
