"""From who takes part to what a step is told."""

from collections.abc import Mapping
from typing import Any

from slsam_ds.combinations import Combination
from slsam_ds.config import SLSAMConfig
from slsam_ds.directions import Direction
from slsam_ds.model.layers import LayerMap
from slsam_ds.plan import Choice, Plan
from slsam_ds.pricing.cost import Workload
from slsam_ds.pricing.pricing import Pricing
from slsam_ds.protocol import ALWAYS
from slsam_ds.schedules import Schedule

# A layer with a tiny probability, once drawn, would otherwise take a step that ruins it.
_MAX_UPDATE_SCALE = 10.0


class Planner:
    """Says which arms each pass of a step is about.

    Args:
        config: The knobs.
        layers: The arms.
        schedule: In which steps to climb.
        direction: Where to.
        combination: What the update descends along.
        pricing: What it costs.
        max_grad_norm: See `Plan`.
    """

    def __init__(
        self,
        config: SLSAMConfig,
        layers: LayerMap,
        *,
        schedule: Schedule,
        direction: Direction,
        combination: Combination,
        pricing: Pricing,
        max_grad_norm: float | None,
    ) -> None:
        self._config, self._max_grad_norm = config, max_grad_norm
        self._schedule, self._direction, self._combination = schedule, direction, combination
        self._pricing = pricing
        self._always = (ALWAYS,) if layers.always else ()

    def plan(self, step: int, choice: Choice, *, workload: Workload, claims: Mapping[str, Any], stop: bool) -> Plan:
        """The plan of a step.

        Args:
            step: Its number.
            choice: Who takes part.
            workload: What it runs where it ascends.
            claims: What the ranks must agree on, besides what is planned here.
            stop: See `Plan`.
        """
        config = self._config
        rho = config.rho if self._schedule.ascends(step) else 0.0
        updated = (*self._always, *choice.updated)
        perturbed = (*self._always, *choice.perturbed) if rho > 0 else ()
        ascended: tuple[int, ...] = ()
        if rho > 0 and self._direction.needs_pass:
            ascended = tuple(sorted({*perturbed, *(updated if self._combination.reads_ascent else ())}))
        scale = {}
        if config.update_scale == "inverse_probability":
            scale = {arm: min(1 / chance, _MAX_UPDATE_SCALE) for arm, chance in choice.probability.items()}
        return Plan(
            step=step,
            choice=choice,
            perturbed=perturbed,
            updated=updated,
            ascended=ascended,
            learning_rate_scale=scale,
            rho=rho,
            scope=config.ascent_scope,
            ascent_fraction=config.ascent_fraction,
            descends_on_part=bool(ascended) and self._combination.takes_part,
            rounding=config.rounding,
            seed=config.seed,
            claims={
                "the step": step,
                f"the active layers of step {step}": choice.updated,
                f"the perturbed layers of step {step}": perturbed,
                "the slsam settings": config.to_dict(),
                "max_grad_norm": self._max_grad_norm,
                "the layers with a previous gradient": self._direction.claims(),
                **claims,
            },
            max_grad_norm=self._max_grad_norm,
            price=self._pricing.price(ascended, updated, workload),
            stop=stop,
        )
