"""Autocast: weights stay float32 and are rounded on their way into each product. What is added to them must survive."""

from typing import Any

import torch
from torch import nn

from slsam_ds.model.layers import LayerMap


class AutocastWatch:
    """Knows which weights of a model autocast rounds, and to what, from the latest forward.

    Args:
        model: The whole model, of which a forward may be run in `torch.autocast`, by the user or by a library.
        layer_map: Its arms.
    """

    def __init__(self, model: nn.Module, layer_map: LayerMap) -> None:
        self._dtype: torch.dtype | None = None
        # Embeddings are looked up in float32; a head that is tied to one counts as that.
        looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        owners = {id(parameter): module for module in model.modules() for parameter in _factors(module)}
        self._rounded = owners.keys() - looked_up
        # Inside of whatever enters autocast, and outside of compiled forwards.
        blocks = list(layer_map.stack.children()) if layer_map.stack is not None else []
        for module in [*blocks, *owners.values()][:1]:
            module.register_forward_pre_hook(self._look)

    def read_dtype(self, parameter: nn.Parameter) -> torch.dtype | None:
        """To what forward rounds it; None: it reads it as it is."""
        rounded = id(parameter) in self._rounded and parameter.dtype == torch.float32
        return self._dtype if rounded else None

    def _look(self, module: nn.Module, inputs: Any) -> None:
        device = next(module.parameters()).device.type
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        self._dtype = torch.get_autocast_dtype(device) if on else None
        if self._dtype == torch.float16 and torch.is_grad_enabled():
            raise ValueError(
                f'torch.autocast("{device}") computes in float16, where small gradients underflow unless the loss is '
                "scaled, which is left to DeepSpeed's fp16: give it dtype=torch.bfloat16"
            )


def _factors(module: nn.Module) -> list[nn.Parameter]:
    """What a module multiplies with: as all linear and convolutional ones call it."""
    own = module.named_parameters(recurse=False)
    return [parameter for name, parameter in own if name == "weight" and parameter.ndim >= 2]
