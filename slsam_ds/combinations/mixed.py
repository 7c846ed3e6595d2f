"""Descend along a mixture of the gradients of both passes: the gradient-norm penalty."""

from typing import Any, ClassVar

from slsam_ds.choices import is_number
from slsam_ds.combinations.combination import Combination


class Mixed(Combination):
    """(1 - a) g + a h: to first order in rho, the gradient of the loss plus a times rho times its gradient's norm.

    a = 1 is SAM and a = 0 the base optimizer, at the price of two passes; above 1 it goes beyond SAM.

    Reference: Zhao, Zhang, Hu 2022 (penalizing gradient norm).
    """

    takes: ClassVar[str | None] = "a number from 0 to 10"
    reads_ascent: ClassVar[bool] = True

    def __init__(self, argument: float) -> None:
        self.share_of_ascent = 1.0 - float(argument)

    @staticmethod
    def accepts(argument: Any) -> bool:
        return is_number(argument) and 0 <= argument <= 10
