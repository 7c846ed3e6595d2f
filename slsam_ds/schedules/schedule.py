"""What every schedule has."""

from typing import Any, ClassVar


class Schedule:
    """Says which steps ascend. A pure function of the step's number, so that all ranks agree without asking.

    Args:
        argument: As the user gave it; None where the schedule has none.
        total_steps: Length of the run; None: unknown.
        seed: Of what is drawn.

    Attributes:
        takes: Describes the argument; None: there is none.
        share: Share of the run's steps that ascend, in [0, 1]: what the expected price of a step is reckoned by.
    """

    takes: ClassVar[str | None] = None
    share: float = 1.0

    def __init__(self, argument: Any, total_steps: int | None, seed: int) -> None: ...

    @staticmethod
    def accepts(argument: Any) -> bool:
        """Whether the schedule can be made with this argument."""
        return argument is None

    def ascends(self, step: int) -> bool:
        """Whether this step (from 1) perturbs the weights."""
        raise NotImplementedError
