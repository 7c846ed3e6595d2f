"""Which tokens are learned: those whose labels are their own ids."""

from collections.abc import Sequence

IGNORED = -100
"""The label that cross-entropy leaves out."""


def masked(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Labels that are the ids within the spans, and ignored elsewhere."""
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def agreement(prefix: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of `prefix` begin `ids`: its last ones may have merged with what follows."""
    pairs = zip(prefix, ids, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(ids)))
