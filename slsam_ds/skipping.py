"""Steps that were skipped because a number was not finite: a warning for each, and an end to too many in a row."""

import logging

from slsam_ds.model.layers import LayerMap
from slsam_ds.plan import BadNumbers, StepResult
from slsam_ds.protocol import ALWAYS

logger = logging.getLogger(__name__)


class BadNumbersError(RuntimeError):
    """Too many steps in a row were skipped; the weights are those of the last step before them."""


def report_skipped(result: StepResult, layers: LayerMap, *, in_a_row: int, limit: int | None) -> None:
    """Warn of a skipped step.

    Args:
        result: The step's.
        layers: The arms, for their names.
        in_a_row: How many steps up to this one were skipped.
        limit: How many may be; None: any number.

    Raises:
        BadNumbersError: The limit is reached.
    """
    what = f"step {result.step} was skipped: {_describe(result.bad_numbers, layers)}"
    if limit is not None and in_a_row >= limit:
        raise BadNumbersError(
            f"{what}; so were the {limit - 1} before it (slsam.max_skipped_steps={limit}), and the weights are "
            f"those of step {result.step - limit}: look at the data, or lower the learning rate or slsam.rho"
        )
    logger.warning("%s", what)


def _describe(bad: BadNumbers | None, layers: LayerMap) -> str:
    if bad is None:
        return "a gradient overflowed"
    if bad.ranks:
        ranks = f"rank {bad.ranks[0]}" if len(bad.ranks) == 1 else f"ranks {', '.join(map(str, bad.ranks))}"
        return f"in the {bad.during} pass, the loss of {ranks} is not finite"
    names = ["what is always trained" if arm == ALWAYS else layers[arm].name for arm in bad.arms]
    return f"in the {bad.during} pass, the gradient of {', '.join(names)} is not finite, though every loss is"
