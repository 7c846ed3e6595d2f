"""The methods that are compared: settings of SL-SAM all of them, so that they differ in nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slsam_ds.recipes import PRESETS


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train.

    Attributes:
        name: On the command line.
        title: In tables.
        knobs: Of `slsam`, where they differ from the defaults.
        lasts_as_long_as: Another method: this one takes as many steps as that one's wall clock has room for.
        tuned_as: Another method: this one has its learning rate. None: it is tuned itself.
    """

    name: str
    title: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    lasts_as_long_as: str | None = None
    tuned_as: str | None = None


def _preset(name: str) -> Method:
    return Method(name=name, title=f"SL-SAM, preset {name}", knobs=PRESETS[name])


_ADAMW = {"selector": "all", "rho": 0.0}

METHODS = {
    method.name: method
    for method in (
        Method(name="adamw", title="AdamW", knobs=_ADAMW),
        Method(
            name="adamw_as_long",
            title="AdamW, SL-SAM's wall clock",
            knobs=_ADAMW,
            lasts_as_long_as="slsam",
            tuned_as="adamw",
        ),
        Method(name="lisa", title="LISA (uniform, rho 0)", knobs={"selector": "uniform", "rho": 0.0}),
        Method(name="dense_sam", title="dense SAM", knobs={"selector": "all"}),
        Method(name="slsam", title="SL-SAM, defaults"),
        Method(name="quarter", title="SL-SAM, ascent_fraction 0.25", knobs={"ascent_fraction": 0.25}),
        Method(name="previous", title="SL-SAM, ascent_source previous", knobs={"ascent_source": "previous"}),
        _preset("single_pass"),
        Method(
            name="all_previous",
            title="SAM, all layers, ascent_source previous",
            knobs={"selector": "all", "ascent_source": "previous"},
        ),
        Method(name="budget", title="SL-SAM, budget 1.0", knobs={"budget": 1.0}),
        _preset("adamw_price"),
    )
}
