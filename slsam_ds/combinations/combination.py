"""What every combination has."""

from typing import Any, ClassVar


class Combination:
    """Makes what the optimizer descends along of g, the gradient at the weights, and h, the one at the perturbed point.

    Args:
        argument: As the user gave it; None where the combination has none.

    Attributes:
        takes: Describes the argument; None: there is none.
        reads_ascent: Whether g is needed of every updated arm. The ascent pass then finds it also of those that are
            not perturbed.
        takes_part: Whether h is found on `ascent_fraction` of the window alone, and g on all of it.
        share_of_ascent: How much of what is descended along is g; the rest is h.
        correction: With `takes_part`: the factor of h - g on that part, which is added to g.
    """

    takes: ClassVar[str | None] = None
    reads_ascent: ClassVar[bool] = False
    takes_part: ClassVar[bool] = False
    share_of_ascent: float = 0.0
    correction: float = 0.0

    def __init__(self, argument: Any) -> None: ...

    @staticmethod
    def accepts(argument: Any) -> bool:
        """Whether the combination can be made with this argument."""
        return argument is None

    def factor(self, ascent_norm: float | None, descent_norm: float) -> float:
        """What h is multiplied by.

        Args:
            ascent_norm: Norm of g over the updated arms and all ranks; None in a step that did not ascend, and where
                `reads_ascent` is false.
            descent_norm: Norm of h, likewise.
        """
        return 1.0
