"""What every schedule has."""

from collections.abc import Mapping
from typing import Any, ClassVar


class Schedule:
    """Says which steps ascend: by the step's number and what it has observed, so that all ranks agree without asking.

    Args:
        argument: As the user gave it; None where the schedule has none.
        total_steps: Length of the run; None: unknown.
        seed: Of what is drawn.

    Attributes:
        takes: Describes the argument; None: there is none.
        compares_norms: Whether `observe` has to be given the norm of the same arms in every step.
        share: Share of the run's steps that ascend, in [0, 1]: what the expected price of a step is reckoned by.
    """

    takes: ClassVar[str | None] = None
    compares_norms: ClassVar[bool] = False
    share: float = 1.0

    def __init__(self, argument: Any, total_steps: int | None, seed: int) -> None: ...

    @staticmethod
    def accepts(argument: Any) -> bool:
        """Whether the schedule can be made with this argument."""
        return argument is None

    def ascends(self, step: int) -> bool:
        """Whether this step (from 1) perturbs the weights."""
        raise NotImplementedError

    def observe(self, sq_norm: float) -> None:
        """See the squared gradient norm of a step that was taken, over all updated arms and ranks.

        Args:
            sq_norm: At the weights, where the step has found it; else at the perturbed point.
        """

    def state_dict(self) -> dict[str, float] | None:
        """What was observed, as JSON-serialisable values."""
        return None

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Continue from `state_dict`."""
