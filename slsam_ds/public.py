"""The public names: what `import slsam_ds` offers, imported when the first of them is asked for."""

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
