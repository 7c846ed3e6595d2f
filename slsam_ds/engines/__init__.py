"""One engine per sharding regime, chosen once, here. The only home of collectives and of DeepSpeed."""

import sys

import torch
from torch import nn

from slsam_ds.layers import LayerMap
from slsam_ds.protocol import Engine


def select_engine(model: nn.Module, optimizer: torch.optim.Optimizer | None, layer_map: LayerMap) -> Engine:
    """The engine that fits how `model` is wrapped.

    Args:
        model: A plain module, or a DeepSpeedEngine.
        optimizer: The torch optimizer of a plain module, groups split by arm; a DeepSpeedEngine brings its own.
        layer_map: The arms.

    Raises:
        ValueError: A wrapper that is not supported.
    """
    if "deepspeed" in sys.modules:  # a DeepSpeedEngine cannot exist unless deepspeed was imported
        from deepspeed.runtime.engine import DeepSpeedEngine

        if isinstance(model, DeepSpeedEngine):
            from slsam_ds.engines.zero12 import ZeroStage12Engine

            return ZeroStage12Engine(model, layer_map)
    wrapper = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"{wrapper}: not supported; pass the module it wraps, slsam_ds averages gradients over ranks")
    if isinstance(model, torch.distributed.fsdp.FSDPModule | torch.distributed.fsdp.FullyShardedDataParallel):
        raise ValueError(f"{wrapper}: FSDP is not supported yet; use DeepSpeed ZeRO stage 1 or 2, or the plain module")
    if optimizer is None:
        raise ValueError("a plain module needs its optimizer: SLSAM(model, optimizer, config)")
    from slsam_ds.engines.local import LocalEngine

    return LocalEngine(model, optimizer, layer_map)
