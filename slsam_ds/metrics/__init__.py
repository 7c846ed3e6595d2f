"""How far a step climbs, and in which geometry.

A new metric is a file with a subclass of `Metric` and an entry in `METRICS`.
"""

from collections.abc import Mapping

from slsam_ds.metrics.adaptive import Adaptive
from slsam_ds.metrics.by_layer import ByLayer
from slsam_ds.metrics.metric import Metric
from slsam_ds.metrics.preconditioned import Preconditioned

__all__ = ["METRICS", "Metric"]

METRICS: Mapping[str, type[Metric]] = {
    "euclidean": Metric,
    "adaptive": Adaptive,
    "preconditioned": Preconditioned,
    "by_layer": ByLayer,
}
"""The values of the knob `metric`."""
