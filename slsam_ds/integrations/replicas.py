"""Models that every rank holds whole: prepared as for training, but for the DistributedDataParallel around them.

SL-SAM averages gradients itself, and an idle one holds buffers for all of them: four bytes a weight.
"""

import contextlib
import functools
from collections.abc import Iterator

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn


def replicates(accelerator: Accelerator) -> bool:
    """Whether it would put a DistributedDataParallel around a model that is to be trained."""
    return accelerator.num_processes > 1 and accelerator.distributed_type not in (
        DistributedType.DEEPSPEED,
        DistributedType.FSDP,
    )


@contextlib.contextmanager
def prepared_bare(accelerator: Accelerator) -> Iterator[None]:
    """Within, the accelerator prepares models to be trained as it does models to be evaluated, without a wrapper."""
    if not replicates(accelerator):
        yield
        return
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
    try:
        yield
    finally:
        del accelerator.prepare_model


def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the weights and buffers of the first, as the wrapper would have done."""
    for tensor in (*model.parameters(), *model.buffers()):
        broadcast(tensor.detach())
