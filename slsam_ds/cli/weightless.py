"""A model on meta tensors, from its configuration alone: its structure and shapes without its weights."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from slsam_ds.cli.refusal import UsageError, path_of, refusals
from slsam_ds.engines.local import LocalEngine
from slsam_ds.model.forward_order import example_inputs
from slsam_ds.model.layers import LayerMap

_TASKS = ("SequenceClassification", "TokenClassification", "ImageClassification", "MaskedLM")
"""What a model may be for beside causal language modelling, as transformers names its auto classes."""


class WeightlessEngine(LocalEngine):
    """Of a model on meta. Numbers and random state have values; they are the CPU's."""

    def __init__(self, model: nn.Module, layer_map: LayerMap) -> None:
        super().__init__(model, torch.optim.SGD(model.parameters()), layer_map)
        self.device = torch.device("cpu")


def build_weightless(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a configuration describes, in training mode.

    Args:
        name: A folder with a config.json, such a file, or a hub id.
        dtype: Of its weights.

    Raises:
        UsageError: No such configuration, or not one of a model that transformers knows.
    """
    config = read_model_config(name)
    architecture = next(iter(config.architectures or ()), "")
    task = next((task for task in _TASKS if architecture.endswith(f"For{task}")), "CausalLM")
    auto_class = getattr(transformers, f"AutoModelFor{task}")
    failures = (ValueError, ImportError, KeyError, AttributeError, TypeError)
    with torch.device("meta"), refusals(*failures, prefix=f"--model {name}: cannot be built: "):
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype)
    model.config.use_cache = False  # as whoever trains sets it
    return model.train()


def forward_of(model: PreTrainedModel, batch_size: int, length: int) -> Callable[[], Tensor]:
    """What runs one micro-batch through the model, or what PEFT has made of it, and returns its loss.

    Args:
        model: As `build_weightless` gives it.
        batch_size: Samples.
        length: Tokens of each, where it takes any.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = example_inputs(base, batch_size, length)
    of_samples = type(base).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))
    shape = (batch_size,) if of_samples else next(iter(inputs.values())).shape
    labels = torch.empty(shape, dtype=torch.long, device="meta")

    def compute_loss() -> Tensor:
        loss: Tensor = model(**inputs, labels=labels).loss
        return loss

    return compute_loss


def read_model_config(name: str) -> PretrainedConfig:
    """The configuration of that name.

    Raises:
        UsageError: There is no such one, or it is not one of a model that transformers knows.
    """
    flag = f"--model {name}"
    path = path_of(flag, name)
    failures: tuple[Any, ...] = (OSError, ValueError, KeyError, AttributeError, TypeError)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{flag}: the folder holds no config.json")
        path = path / "config.json"
    elif not path.exists():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(".json"):
            raise UsageError(f"{flag}: no such folder or file")
        with refusals(*failures, prefix=f"{flag}: no such folder or file, and not to be had from the hub: "):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    with refusals(*failures, prefix=f"{flag}: not the configuration of a model: "):
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
