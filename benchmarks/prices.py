"""What samples cost on a model and its data, counted by its own engine."""

from typing import Any

from slsam_ds import SLSAM
from slsam_ds.calibration import calibrate
from slsam_ds.cost import CostModel
from slsam_ds.micro_batches import model_loss


def count_costs(slsam: SLSAM, micro_batch: Any) -> CostModel:
    """FLOPs of the parts of a step on such micro-batches."""
    return calibrate(
        slsam.engine, slsam.model, slsam.layers, lambda: slsam.engine.backward(model_loss(slsam.model, micro_batch))
    )
