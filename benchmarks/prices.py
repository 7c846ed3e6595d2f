"""What samples cost on a model and its data, counted by its own engine."""

from typing import Any

from slsam_ds import SLSAM
from slsam_ds.engines.guard import stepping
from slsam_ds.model.micro_batches import model_loss
from slsam_ds.pricing.calibration import calibrate
from slsam_ds.pricing.cost import CostModel


def count_costs(slsam: SLSAM, micro_batch: Any) -> CostModel:
    """FLOPs of the parts of a step on such micro-batches."""
    with stepping():  # nothing is updated
        return calibrate(
            slsam.engine, slsam.model, slsam.layers, lambda: slsam.engine.backward(model_loss(slsam.model, micro_batch))
        )
