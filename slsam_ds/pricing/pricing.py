"""What the steps of a run cost, and what the choice of layers and the rewards may know of it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any

from slsam_ds.config import SLSAMConfig
from slsam_ds.model.layers import LayerMap
from slsam_ds.pricing.cost import CostModel, PriceList, Workload


class Pricing:
    """FLOPs, counted in the run's first step where layers are chosen or rewarded by price; elsewhere weights stand in.

    Args:
        config: The knobs.
        layers: The arms.
        on_prices: Told what samples cost, on average over all steps, when it is known.
        ascent_share: Share of the steps that ascend.
    """

    def __init__(
        self, config: SLSAMConfig, layers: LayerMap, on_prices: Callable[[PriceList], object], *, ascent_share: float
    ) -> None:
        self._on_prices, self._ascent_share = on_prices, ascent_share
        self._chooses_by_price = config.budget is not None or config.reward == "grad_norm_per_cost"
        self._by_weights = CostModel.by_weights(layers)
        self._counted: CostModel | None = None
        self._workload: Workload | None = None

    @property
    def must_count(self) -> bool:
        """Whether the next choice waits for FLOPs."""
        return self._chooses_by_price and self._counted is None

    @property
    def costs(self) -> CostModel:
        """What parts of a step cost: as counted, or by weights."""
        return self._counted or self._by_weights

    def use(self, counted: CostModel, workload: Workload) -> None:
        """Go by these FLOPs from here on.

        Args:
            counted: The same on every rank.
            workload: Of a step that ascends.
        """
        self._counted, self._workload = counted, workload
        self._on_prices(counted.prices(workload.thinned(self._ascent_share)))

    def price(self, ascended: Collection[int], updated: Collection[int], workload: Workload) -> float:
        """The price of a step, a step of AdamW on the same parameters being 1.

        Args:
            ascended: Arms of the ascent pass; empty where there is none.
            updated: Arms of the descent.
            workload: Of a step that ascends.
        """
        return self.costs.price(ascended, updated, workload)

    def state_dict(self) -> Mapping[str, Any] | None:
        """What was counted, as JSON-serialisable values; None where nothing was."""
        if self._counted is None or self._workload is None:
            return None
        return {"counted": asdict(self._counted), "passes": asdict(self._workload)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what was counted: prices that change in a run would change what is drawn."""
        if self._chooses_by_price and state:
            self.use(CostModel.from_dict(state["counted"]), Workload(**state["passes"]))
