"""Sparse-Layer Sharpness-Aware Minimization for LLM fine-tuning under DeepSpeed ZeRO."""

from slsam_ds.config import SLSAMConfig
from slsam_ds.initialization import SLSAMEngine, initialize
from slsam_ds.model.given_groups import given_groups
from slsam_ds.model.micro_batches import windows
from slsam_ds.plan import StepResult
from slsam_ds.protocol import RanksDisagreeError
from slsam_ds.skipping import BadNumbersError
from slsam_ds.slsam import SLSAM

__all__ = [
    "SLSAM",
    "BadNumbersError",
    "RanksDisagreeError",
    "SLSAMConfig",
    "SLSAMEngine",
    "StepResult",
    "given_groups",
    "initialize",
    "windows",
]
__version__ = "0.1.0"
