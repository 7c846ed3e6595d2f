"""The settings of DeepSpeed's configuration, section by section: which are supported, and why the others are not.

DeepSpeed passes over what it does not know, fails on some values far from where they stand, and by assertion on others.
Read in deepspeed/runtime/config.py of 0.18.6 to 0.19.8.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DtypeEnum
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

from slsam_ds.sentences import did_you_mean

SECTIONS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "compile", "csv_monitor", "data_efficiency", "data_types", "datastates_ckpt", "expert_parallel", "flops_profiler",
    "fp16", "hybrid_engine", "optimizer", "pipeline", "scheduler", "tensor_parallel", "tensorboard", "timers",
    "torch_autocast", "wandb", "zero_optimization",
)  # fmt: skip
VALUES = (
    "communication_data_type", "dataloader_drop_last", "disable_allgather", "disable_python_gc", "dump_state",
    "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "log_level", "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients",
    "seq_parallel_communication_data_type", "steps_per_print", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
REFUSED: Mapping[str, str] = {
    "amp": "use bf16, fp16 or torch_autocast",
    "compression_training": "the weights would not be those that are perturbed",
    "curriculum_learning": "order the samples in the data loader",
    "data_parallel_size": "every rank is a data-parallel one here",
    "eigenvalue": "DeepSpeed has given it up",
    "elasticity": "a checkpoint is loaded by any number of ranks without it",
    "graph_harvesting": "DeepSpeed has given it up",
    "nebula": "checkpoints are DeepSpeed's plain ones",
    "progressive_layer_drop": "the layers of a step are SL-SAM's to choose",
    "quantize_training": "the weights would not be those that are perturbed",
    "sequence_parallel_size": "every rank is a data-parallel one here",
    "sparse_attention": "DeepSpeed has given it up",
    "sparse_gradients": "gradients are reduced dense",
    "weight_quantization": "it is for inference",
}
"""Keys that must not be there, and what there is to say about each; most were removed from DeepSpeed in 0.19."""
_SWITCHES: Mapping[str, str] = {
    "autotuning.enabled": "choose the settings beforehand",
    "compile.deepcompile": "a compiled graph fits one sample of layers",
    "data_efficiency.enabled": "order the samples in the data loader",
    "expert_parallel.enabled": "every rank is a data-parallel one here",
    "hybrid_engine.enabled": "switch it off",
    "checkpoint.load_universal": "leave it out, slsam_ds loads plain checkpoints of any number of ranks",
}
_DTYPES = ("communication_data_type", "torch_autocast.dtype", "data_types.grad_accum_dtype", "data_types.param_dtype")
_UNSUPPORTED_OPTIMIZERS = ("muon", "onebit", "zeroone")
"""How the names of those begin that make gradients orthogonal over a whole matrix, or communicate by themselves."""


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse what is not supported and what DeepSpeed would fail on without a sentence.

    Args:
        config: DeepSpeed's part; no "auto" in it. Sections of DeepSpeed's pydantic models are checked elsewhere.

    Raises:
        ValueError: Naming the setting, its value and what to use.
    """
    for key, reason in REFUSED.items():
        if key in config:
            raise ValueError(f"{key}={_shown(config[key])}: not supported; leave it out: {reason}")
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), Mapping):
            raise ValueError(f"{name}={config[name]!r}: expected a section, like {{...}}")
    for path, reason in _SWITCHES.items():
        if value_at(config, path) is True:
            raise ValueError(f"{path}=true: not supported; {reason}")
    size = value_at(config, "tensor_parallel.autotp_size")
    if size not in (None, 0, 1):
        raise ValueError(
            f"tensor_parallel.autotp_size={_shown(size)}: not supported; slsam_ds supports data parallelism only"
        )
    for path in _DTYPES:
        _check_dtype(path, value_at(config, path))
    _check_reduction(config)
    if all(value_at(config, f"{name}.enabled") is True for name in ("fp16", "bf16")):
        raise ValueError("fp16.enabled=true and bf16.enabled=true: choose one of them")
    _check_type(config, "optimizer", DEEPSPEED_OPTIMIZERS, torch.optim, torch.optim.Optimizer, fold=str.lower)
    schedulers = torch.optim.lr_scheduler
    _check_type(config, "scheduler", VALID_LR_SCHEDULES, schedulers, schedulers.LRScheduler)


def without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without its "auto" values, at any depth: DeepSpeed's defaults take their place."""
    kept = {key: value for key, value in config.items() if not (isinstance(value, str) and value == "auto")}
    return {key: without_auto(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _check_reduction(config: Mapping[str, Any]) -> None:
    if str(config.get("gradient_allreduce_op", "mean")).lower() != "mean":
        operation = _shown(config["gradient_allreduce_op"])
        raise ValueError(
            f'gradient_allreduce_op={operation}: not supported; use "mean", because SL-SAM averages over ranks'
        )
    factor, prescales = config.get("gradient_predivide_factor", 1.0), config.get("prescale_gradients", False)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor <= 0:
        raise ValueError(f"gradient_predivide_factor={_shown(factor)}: choose a number above 0")
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) != 0 and zero.get("reduce_scatter", True):
        for name, on in (("prescale_gradients", prescales), ("gradient_predivide_factor", factor != 1.0)):
            if on:
                raise ValueError(
                    f"{name}={_shown(config[name])}: needs zero_optimization.reduce_scatter=false with ZeRO"
                )


def _check_dtype(path: str, dtype: Any) -> None:
    if dtype is None:
        return
    try:
        DtypeEnum(dtype.lower() if isinstance(dtype, str) else dtype)
    except ValueError:
        raise ValueError(f'{path}={_shown(dtype)}: choose "fp32", "bf16" or "fp16"') from None


def _check_type(
    config: Mapping[str, Any],
    name: str,
    own: Sequence[str],
    module: Any,
    base: type,
    *,
    fold: Callable[[str], str] = str,
) -> None:
    """Refuse a section that names nothing that DeepSpeed could build, or nothing at all: it would be passed over."""
    section = config.get(name)
    if section is None:
        return
    asked = section.get("type")
    if not isinstance(asked, str):
        raise ValueError(f"{name}.type={_shown(asked)}: expected a name, like {sorted(own)[0]!r}")
    kind, found = fold(asked), getattr(module, asked, None)
    is_torchs = isinstance(found, type) and issubclass(found, base) and found is not base
    if kind.startswith(_UNSUPPORTED_OPTIMIZERS) or (kind not in own and not is_torchs):
        torchs = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
        names = [each for each in (*torchs, *own) if not each.startswith(_UNSUPPORTED_OPTIMIZERS)]
        same = [each for each in names if each.lower() == asked.lower()]
        hint = did_you_mean(same[0] if same else asked, names, f"choose one of {module.__name__}")
        raise ValueError(f"{name}.type={_shown(asked)}: not supported; {hint}")


def value_at(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return {"True": "true", "False": "false", "None": "null"}.get(text, text)
