"""Whether the descent starts above a prefix: decided anew in each step, and given up for good where it went wrong."""

import logging
import math

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.forward_state import ForwardState
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.prefix import Prefix
from slsam_ds.plan import Plan, StepResult

logger = logging.getLogger(__name__)


class PrefixReuse:
    """What `prefix_reuse` asks for.

    Args:
        config: The knobs.
        layers: The arms.
        state: Of the model's forwards.
        may_skip_modules: See `Engine.may_skip_modules`.

    Attributes:
        allowed: The descent may start above the blocks that both passes have in common.

    Raises:
        ValueError: It is insisted on where it cannot be.
    """

    def __init__(self, config: SLSAMConfig, layers: LayerMap, state: ForwardState, *, may_skip_modules: bool) -> None:
        self._layers, self._state = layers, state
        self._passed: set[tuple[int, bool]] = set()  # depths whose trial was passed, in windows of one and of several
        obstacles = {
            "the layers were named by patterns": layers.stack is None,
            "this engine runs all of the model every time": not may_skip_modules,
        }
        found = [obstacle for obstacle, present in obstacles.items() if present]
        if found and config.prefix_reuse is True:
            raise ValueError(f'slsam.prefix_reuse=true: {found[0]}; use "auto" or false')
        self.allowed = config.prefix_reuse is not False and not found

    def prefix_of(self, plan: Plan, num_micro_batches: int) -> Prefix | None:
        """The blocks below every arm that the step perturbs or updates; None where all blocks run in both passes."""
        prefix = None
        if self.allowed and plan.ascended:
            prefix = Prefix.below(self._layers, plan.touched, self._state)
        # In a window of one, what the ascent left behind in the model is right in the descent, too.
        if prefix is not None and (prefix.depth, num_micro_batches > 1) in self._passed:
            prefix.trial = True
        return prefix

    def review(self, prefix: Prefix | None, result: StepResult, num_micro_batches: int) -> None:
        """After a step: give up where a block's output is used by more than the next block."""
        if prefix is None:
            return
        if prefix.trial:
            self._passed.add((prefix.depth, num_micro_batches > 1))
        reasons = {
            "something keeps what lower layers compute": prefix.watched,
            "the loss or its gradient reads more of the lower layers than what the last of them puts out": (
                prefix.trial is False
            ),
            # which stood in for what the blocks would have computed
            "the perturbed loss is NaN": prefix.handed_on and _lost_in_descent(result),
        }
        for reason in [reason for reason, found in reasons.items() if found][:1]:
            logger.warning("step %d: %s: from now on both passes run every layer (prefix_reuse)", result.step, reason)
            self.allowed = False


def _lost_in_descent(result: StepResult) -> bool:
    """Whether the loss was a number at x and is none at x + ε."""
    ascended = result.ascent_loss is not None and math.isfinite(result.ascent_loss)
    bad = result.bad_numbers
    return ascended and bad is not None and bad.during == "descent" and math.isnan(result.loss)
