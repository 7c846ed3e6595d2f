"""What we set out to reach, and what was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.modes import BUDGET, EXACT, FINE_TUNING, FRACTION, OVERHEAD, PREVIOUS, Mode
from benchmarks.rows import Row, row, rows

Sections = Mapping[str, Mapping[str, Any]]
"""What was found, by section; sections that were never measured are missing."""


def acceptance_table(sections: Sections) -> str:
    """Markdown: every target with its measured value."""
    lines = ["| measure | against AdamW | target | against dense SAM | target |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *_clock(sections), *_rest(sections)])


def _clock(sections: Sections) -> Iterator[str]:
    uniform, tuned = sections.get("comparison"), sections.get("fine_tuning")
    two_pass, fraction, previous, budget = FINE_TUNING
    timed: list[tuple[str, Mapping[str, Any] | None, Mode, float, float | None]] = [
        ("exact two-pass, uniform, wall clock", uniform, EXACT, 1.20, 0.60),
        ("`ascent_fraction` 0.25, uniform, wall clock", uniform, FRACTION, 0.85, 0.45),
        ("`ascent_source: previous`, uniform, wall clock", uniform, PREVIOUS, 0.70, 0.37),
        ("exact two-pass, bandit, fine-tuning, wall clock", tuned, two_pass, 1.20, 0.60),
        ("`ascent_fraction` 0.25, bandit, fine-tuning, wall clock", tuned, fraction, 0.85, 0.45),
        ("`ascent_source: previous`, bandit, fine-tuning, wall clock", tuned, previous, 0.70, 0.37),
        ("`budget: 1.0`, wall clock", uniform, BUDGET, 1.05, None),
        ("`budget: 1.0`, fine-tuning, wall clock", tuned, budget, 1.05, None),
    ]
    for name, section, mode, to_adamw, to_dense in timed:
        found = row(section, mode)
        low, high = found.time_range if found else (0.0, 0.0)
        cell = f"{_judged(found.time, to_adamw)} ({low:.2f}-{high:.2f})" if found else "not measured"
        against_dense = f"{_judged(found.time_to_dense, to_dense)}" if found else "not measured"
        yield _line(name, cell, to_adamw, against_dense, to_dense)


def _rest(sections: Sections) -> Iterator[str]:
    comparison = sections.get("comparison")
    ours = [one for one in rows(comparison or {"groups": []}) if one.one.mode.startswith("SL-SAM")]
    if ours:
        worst = max(ours, key=lambda one: one.excess)
        name = f"wall-clock ratio over FLOP ratio, largest of the SL-SAM rows ({worst.one.mode})"
        yield _line(name, _judged(worst.excess, 1.10), 1.10, "", None)
    exact = row(comparison, EXACT)
    if exact is not None and exact.one.activations:
        held = [exact.held(exact.one) / exact.held(other) for other in (exact.adamw, exact.dense)]
        cells = [_judged(share, 0.65) for share in held]
        yield _line("saved activations + gradients, exact two-pass", cells[0], 0.65, cells[1], 0.65)
    for engine, found in sections.get("traffic", {}).items():
        one = row(found, EXACT)
        assert one is not None
        cells = [
            f"{one.sent_to_adamw:.2f}",
            _judged(one.sent_to_dense, 0.55),
        ]
        yield _line(f"{engine}, total bytes, exact two-pass", cells[0], None, cells[1], 0.55)
    overhead: Row | None = row(comparison, OVERHEAD)
    if overhead is not None:
        low, high = overhead.time_range
        cell = f"{_judged(overhead.time, 1.02)} ({low:.2f}-{high:.2f})"
        yield _line("overhead of `slsam_ds`: rho 0, all layers, against the engine alone", cell, 1.02, "", None)


def _line(name: str, to_adamw: str, target: float | None, to_dense: str, dense_target: float | None) -> str:
    targets = [f"≤ {one:.2f}" if one is not None else "" for one in (target, dense_target)]
    return f"| {name} | {to_adamw} | {targets[0]} | {to_dense} | {targets[1]} |"


def _judged(value: float, target: float | None) -> str:
    """The value; bold where it misses its target as printed."""
    return f"**{value:.2f}**" if target is not None and round(value, 2) > target else f"{value:.2f}"
