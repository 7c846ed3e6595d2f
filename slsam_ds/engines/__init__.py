"""One engine per sharding regime, chosen once, here. The only home of collectives and of DeepSpeed."""

import sys
from typing import Any

import torch
from torch import nn

from slsam_ds.model.layers import LayerMap
from slsam_ds.protocol import Engine


def select_engine(model: nn.Module, optimizer: torch.optim.Optimizer | None, layer_map: LayerMap) -> Engine:
    """The engine that fits how `model` is wrapped.

    Args:
        model: A plain module, one sharded by `fully_shard`, or a DeepSpeedEngine.
        optimizer: The torch optimizer of a module, groups split by arm; a DeepSpeedEngine brings its own.
        layer_map: The arms.

    Raises:
        ValueError: A layout or setting that is not supported.
    """
    if is_deepspeed_engine(model):
        return _select_deepspeed_engine(model, layer_map)
    if optimizer is None:
        raise ValueError("SLSAM needs the optimizer of this model: SLSAM(model, optimizer, config)")
    from torch.distributed.fsdp import FSDPModule  # half a second that `import slsam_ds` need not take

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        from slsam_ds.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(model, optimizer, layer_map)
    from slsam_ds.engines.local import LocalEngine

    return LocalEngine(model, optimizer, layer_map)


def is_deepspeed_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed steps the model."""
    if "deepspeed" not in sys.modules:  # then there can be no DeepSpeedEngine, and importing it takes seconds
        return False
    from deepspeed.runtime.engine import DeepSpeedEngine

    return isinstance(model, DeepSpeedEngine)


def _select_deepspeed_engine(model: Any, layer_map: LayerMap) -> Engine:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from slsam_ds.engines.deepspeed.zero0 import ZeroStage0Engine
    from slsam_ds.engines.deepspeed.zero3 import ZeroStage3Engine
    from slsam_ds.engines.deepspeed.zero12 import ZeroStage12Engine

    if type(model) is not DeepSpeedEngine:  # one that orders forward and backward by itself, or changes weights between
        raise ValueError(f"{type(model).__name__}: not supported; slsam_ds needs a plain DeepSpeedEngine")
    match int(model.zero_optimization_stage()):
        case 0:
            return ZeroStage0Engine(model, layer_map)
        case 1 | 2:
            return ZeroStage12Engine(model, layer_map)
        case 3:
            return ZeroStage3Engine(model, layer_map)
        case stage:
            raise ValueError(f"DeepSpeed ZeRO stage {stage}: not supported; use 0, 1, 2 or 3")


def release_gathered(model: nn.Module) -> None:
    """Make `model.parameters()` name the parameters that the optimizer holds, so that layers can be found.

    A forward without backward (an evaluation) leaves FSDP2's root gathered, with other tensors in their place.

    Raises:
        ValueError: A wrapper that is not supported.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrapper = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"{wrapper}: not supported; pass the module that it wraps, because slsam_ds itself averages gradients"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(f"{wrapper}: FSDP1 is not supported; shard the module with fully_shard (FSDP2) instead")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
