"""How far a run has come."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A value: a step makes another.

    Attributes:
        step: Number of steps taken, skipped ones among them.
        skipped_in_a_row: How many of the latest ones were skipped.
        updates: By arm: how often it was updated; once, at the least, where the optimizer brought state of it along.
    """

    step: int
    skipped_in_a_row: int
    updates: tuple[int, ...]

    @classmethod
    def start(cls, num_arms: int, *, after: int = 0) -> Self:
        """Of a run that has not begun, or goes on after steps of another kind that updated every arm."""
        return cls(step=after, skipped_in_a_row=0, updates=(after,) * num_arms)

    def after(self, updated: Collection[int], *, skipped: bool) -> "Progress":
        """One step on."""
        if skipped:
            return Progress(step=self.step + 1, skipped_in_a_row=self.skipped_in_a_row + 1, updates=self.updates)
        updates = tuple(count + (arm in updated) for arm, count in enumerate(self.updates))
        return Progress(step=self.step + 1, skipped_in_a_row=0, updates=updates)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {"step": self.step, "skipped_in_a_row": self.skipped_in_a_row, "updates": list(self.updates)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `to_dict` gave; other entries are passed over."""
        return cls(
            step=int(values["step"]),
            skipped_in_a_row=int(values["skipped_in_a_row"]),
            updates=tuple(int(count) for count in values["updates"]),
        )
