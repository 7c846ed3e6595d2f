"""How the arms of a step are drawn.

A new selector is a file with a class that keeps to `Selector` and one case in `make_selector`.
"""

import math

from slsam_ds.bandit import Exp3M
from slsam_ds.config import SLSAMConfig
from slsam_ds.pricing.budget import BudgetedExp3
from slsam_ds.selectors.adambs import AdamBS
from slsam_ds.selectors.all_arms import AllArms
from slsam_ds.selectors.cyclic import Cyclic
from slsam_ds.selectors.depth import Depth
from slsam_ds.selectors.selector import Selector
from slsam_ds.selectors.top_k import TopK
from slsam_ds.selectors.uniform import Uniform

__all__ = [
    "AdamBS",
    "AllArms",
    "BudgetedExp3",
    "Cyclic",
    "Depth",
    "Exp3M",
    "Selector",
    "TopK",
    "Uniform",
    "make_selector",
]


def make_selector(config: SLSAMConfig, num_arms: int, *, total_steps: int | None = None) -> Selector:
    """The selector that the configuration asks for.

    Args:
        config: Names the selector, how many arms it activates, and its knobs.
        num_arms: Number of arms.
        total_steps: Length T of the run; only `gamma="auto"` needs it.

    Raises:
        ValueError: `gamma="auto"` without a run length, or a number out of range.
    """
    if config.budget is not None:
        gamma = _gamma(config, num_arms, 1, total_steps)
        budgeted = Depth if config.selector == "depth" else BudgetedExp3
        return budgeted(num_arms, config.budget, gamma, config.seed, share=config.share)
    k = config.num_active(num_arms)
    match config.selector:
        case "exp3m":
            return Exp3M(num_arms, k, _gamma(config, num_arms, k, total_steps), config.seed, share=config.share)
        case "uniform":
            return Uniform(num_arms, k, config.seed)
        case "cyclic":
            return Cyclic(num_arms, k)
        case "all":
            return AllArms(num_arms)
        case "top_k":
            return TopK(num_arms, k)
        case "bernoulli":
            return AdamBS(num_arms, config.expected_active(num_arms), config.seed)
        case "depth":
            gamma = _gamma(config, num_arms, 1, total_steps)
            return Depth.of_size(num_arms, config.expected_active(num_arms), gamma, config.seed, share=config.share)


def _gamma(config: SLSAMConfig, num_arms: int, k: int, total_steps: int | None) -> float:
    return _tuned_gamma(num_arms, k, total_steps) if config.gamma == "auto" else config.gamma


def _tuned_gamma(num_arms: int, k: int, total_steps: int | None) -> float:
    """min(1, sqrt(L ln(L/k) / ((e-1) k T))): Uchiya et al. 2010, for rewards of at most 1."""
    if total_steps is None or total_steps < 1:
        raise ValueError(
            f'slsam.gamma="auto" with total_steps={total_steps}: give the number of steps of the run (at least 1), '
            "or choose gamma in (0, 1]"
        )
    if k == num_arms:
        return 1.0  # nothing to explore, and the formula gives 0, which is no gamma
    return min(1.0, math.sqrt(num_arms * math.log(num_arms / k) / ((math.e - 1) * k * total_steps)))
