"""An estimate as text for a terminal."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from slsam_ds.estimate.counting import Counted
from slsam_ds.estimate.modes import Mode, Spread

_GIGA = 1e9
_KINDS = {
    "weights": "weights",
    "kept": "kept for the descent",
    "gradients": "gradients",
    "optimizer": "optimizer, masters",
    "activations": "activations",
    "total": "in all",
    "host": "on the host",
}


def layer_table(counted: Counted) -> str:
    """The arms with their weights; neighbours that are alike in one line."""
    rows = [("layer", "weights", "name")]
    for numel, group in itertools.groupby(enumerate(counted.numels), key=lambda entry: entry[1]):
        arms = [arm for arm, _ in group]
        first, last = arms[0], arms[-1]
        numbers = str(first) if first == last else f"{first}-{last}"
        name = counted.names[first] if first == last else f"{counted.names[first]} to {counted.names[last]}, each"
        rows.append((numbers, f"{numel:,}", name))
    if counted.always:
        rows.append(("always", f"{counted.always:,}", "trained in every step"))
    frozen = counted.total - counted.trained
    if frozen:
        rows.append(("frozen", f"{frozen:,}", "never trained"))
    return "\n".join(_aligned(rows, left=(0, 2)))


def mode_table(modes: Sequence[Mode]) -> str:
    """What a step of each mode takes on one rank; for the last mode, how far its samples are apart."""
    ours = modes[-1].name
    rows = [["each rank, each step", *(mode.name for mode in modes[:-1]), f"{ours}, mean", "least to most"]]

    def add(title: str, read: Callable[[Mode], Spread], show: Callable[[float], str]) -> None:
        spreads = [read(mode) for mode in modes]
        last = spreads[-1]
        apart = not math.isclose(last.lowest, last.highest, rel_tol=1e-3, abs_tol=1e-9)
        cells = [show(spread.mean) for spread in spreads]
        rows.append([title, *cells, f"{show(last.lowest)} to {show(last.highest)}" if apart else ""])

    def add_memory(kind: str, title: str) -> None:
        if any(mode.memory[kind].highest for mode in modes):
            add(f"  {title}", lambda mode: mode.memory[kind], _gigabytes)

    add("FLOPs, AdamW = 1", lambda mode: mode.price, lambda value: f"{value:.2f}")
    add("FLOPs, in 10^12", lambda mode: mode.flops, lambda value: _short(value / 1e12))
    rows.append(["memory, GB"])
    for kind, title in _KINDS.items():
        add_memory(kind, title)
    rows.append(["traffic, GB"])
    add("  reduced", lambda mode: mode.reduced, _gigabytes)
    add("  gathered", lambda mode: mode.gathered, _gigabytes)
    width = len(rows[0])
    return "\n".join(_aligned([[*row, *[""] * (width - len(row))] for row in rows], left=(0,)))


def _gigabytes(num_bytes: float) -> str:
    return _short(num_bytes / _GIGA) if num_bytes else "-"


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < 1000 else f"{value:,.0f}"


def _aligned(rows: Iterable[Sequence[str]], left: Sequence[int]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, range(len(row)), strict=True)
        yield "  ".join(f"{cell:<{n}}" if column in left else f"{cell:>{n}}" for cell, n, column in cells).rstrip()
