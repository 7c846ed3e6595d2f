"""Descend along the whole window's gradient, corrected by what SAM changes on a part of it."""

from typing import Any, ClassVar

from slsam_ds.choices import is_number
from slsam_ds.combinations.combination import Combination


class Corrected(Combination):
    """g + c (h' - g'): g over the whole window at the weights, g' and h' over `ascent_fraction` of it, at x and x + ε.

    SAM's correction h - g is found on a part of the samples. ε is along g', as if the part were the whole window: what
    SAM changes is the more, the fewer samples climb together. c = 1 and the whole window would be SAM; `mixed` with
    a = c is that. The part is the first whole micro-batches of a window where it is so many, at a price of 1 +
    `ascent_fraction`, the base optimizer's being 1; else the first samples of these, which run apart from the window,
    at 1 + 2 `ascent_fraction`.
    """

    takes: ClassVar[str | None] = "a number above 0, up to 10"
    reads_ascent: ClassVar[bool] = True
    takes_part: ClassVar[bool] = True

    def __init__(self, argument: float) -> None:
        self.correction = float(argument)

    @staticmethod
    def accepts(argument: Any) -> bool:
        return is_number(argument) and 0 < argument <= 10
