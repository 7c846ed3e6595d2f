"""Building a DeepSpeedEngine whose optimizer keeps one parameter group per arm."""

import logging
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from slsam_ds.engines.deepspeed.config import check_config
from slsam_ds.engines.deepspeed.operator_locks import warn_of_abandoned_locks
from slsam_ds.model.layers import LayerMap
from slsam_ds.model.param_groups import split_param_groups

logger = logging.getLogger(__name__)

# What Hugging Face's TrainingArguments default to where a DeepSpeed JSON says "auto", so that one file serves both.
_AUTO_DEFAULTS: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
_DEFAULT_LEARNING_RATE = 5e-5


def build_engine(
    model: nn.Module,
    config: dict[str, Any],
    layer_map: LayerMap,
    *,
    optimizer: Any = None,
    model_parameters: Any = None,
    lr_scheduler: Any = None,
    **kwargs: Any,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """`deepspeed.initialize` with parameter groups split by arm, and AdamW where no optimizer is given.

    Args:
        model: The module.
        config: DeepSpeed's configuration without the `slsam` block; "auto" values are resolved.
        layer_map: The arms.
        optimizer: A torch optimizer whose groups are split by arm, or a function from parameter groups to one.
        model_parameters: What an optimizer from the JSON or from a function trains, as in `deepspeed.initialize`.
        lr_scheduler: A scheduler, or a function from the optimizer to one.
        **kwargs: Passed on to `deepspeed.initialize`.

    Returns:
        engine, optimizer, dataloader, scheduler: as `deepspeed.initialize`.
    """
    config = _resolve_auto(config, model)
    check_config(config)
    if isinstance(model, PipelineModule):
        raise ValueError("PipelineModule: pipeline parallelism is not supported; pass a module that runs as a whole")
    if not isinstance(optimizer, torch.optim.Optimizer):
        trained = list(model_parameters) if model_parameters is not None else _trained_parameters(layer_map)
        model_parameters = split_param_groups(trained, layer_map)
        if optimizer is None and "optimizer" not in config:
            logger.info("no optimizer given: AdamW with lr=%g", _DEFAULT_LEARNING_RATE)
            if _offloads_optimizer(config):  # torch's would be slow on the CPU, DeepSpeed has one of its own
                config["optimizer"] = {"type": "AdamW", "params": {"lr": _DEFAULT_LEARNING_RATE, "weight_decay": 0.01}}
            else:
                optimizer = torch.optim.AdamW(model_parameters, lr=_DEFAULT_LEARNING_RATE)
    warn_of_abandoned_locks()
    engine, *others = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=model_parameters,
        lr_scheduler=lr_scheduler,
        config=config,
        **kwargs,
    )
    return engine, *others


def _offloads_optimizer(config: Mapping[str, Any]) -> bool:
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _trained_parameters(layer_map: LayerMap) -> list[nn.Parameter]:
    in_arms = [parameter for layer in layer_map for _, parameter in layer.parameters]
    return in_arms + [parameter for _, parameter in layer_map.always]


def _resolve_auto(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Fill in the "auto" values that Hugging Face's Trainer would; other "auto"s give way to DeepSpeed's defaults."""
    dtype = next(model.parameters()).dtype
    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    resolved: dict[str, Any] = {}
    for key, value in config.items():
        if value == "auto":
            if key in _AUTO_DEFAULTS:
                resolved[key] = _AUTO_DEFAULTS[key]
                logger.info("%s=auto: using %s", key, resolved[key])
        elif isinstance(value, Mapping):
            filled = {inner: precision[key] for inner in value if key in precision and value[inner] == "auto"}
            resolved[key] = {inner: item for inner, item in value.items() if item != "auto"} | filled
        else:
            resolved[key] = value
    return resolved
