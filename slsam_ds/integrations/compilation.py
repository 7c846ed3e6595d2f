"""`torch_compile` for a model whose layers take turns in being trainable: each block by itself, not the whole.

A compiled graph is made for one choice of trainable parameters. The whole model would need one per sample of layers;
a block, with all blocks like it, needs a few: trained or not, and with or without gradients to pass down.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn

from slsam_ds.model.layers import LayerMap


def take_over_compilation(trainer: Any) -> dict[str, Any]:
    """Keep accelerate from compiling the whole model.

    Returns:
        What the user asked `torch.compile` for; empty: nothing.

    Raises:
        ValueError: Under ZeRO-3, which gathers weights in hooks inside the blocks.
    """
    state = trainer.accelerator.state
    state.dynamo_plugin.backend = DynamoBackend.NO
    if not trainer.args.torch_compile:
        return {}
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError("torch_compile=True: not supported under ZeRO-3; use ZeRO-2 or FSDP2, or leave it out")
    return {"backend": trainer.args.torch_compile_backend, "mode": trainer.args.torch_compile_mode}


@contextlib.contextmanager
def compiled_blocks(layer_map: LayerMap, **kwargs: Any) -> Iterator[None]:
    """Run the blocks' forwards compiled; hooks around them, which gather weights or keep outputs, run as they are.

    Args:
        layer_map: Knows the blocks.
        **kwargs: For `torch.compile`; none: change nothing.

    Raises:
        ValueError: There are no blocks to be found.
    """
    blocks = list(layer_map.stack.children()) if layer_map.stack is not None else []
    if kwargs and not blocks:
        raise ValueError(
            "torch_compile=True: needs blocks, which are not known with slsam.layers; leave out one of them"
        )
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks if kwargs else ():
            block.forward = torch.compile(block.forward, **kwargs)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            _set_forward(block, forward)


def _set_forward(block: nn.Module, forward: Any) -> None:
    """Give a block the forward of its own that it had; None: that of its class."""
    if forward is not None:
        block.forward = forward
    else:
        vars(block).pop("forward", None)
