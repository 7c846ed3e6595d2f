"""Forwards on meta tensors that take, and leave behind, what they would on a device."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from slsam_ds.model.forward_order import NoValues


class OnMeta(NoValues):
    """Within, attention is one kernel, as on a GPU: on meta, torch would take it apart and keep every score.

    Args:
        keeps_inputs: Linear layers keep their inputs whether they are active or not: ZeRO-3's do.
    """

    def __init__(self, *, keeps_inputs: bool) -> None:
        super().__init__()
        self._keeps_inputs = keeps_inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is F.linear and self._keeps_inputs:
            return _InputKept.apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return super().__torch_function__(func, types, args, kwargs)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """As on a GPU: FlashAttention; with a mask, or values of another size than the queries, as in multi-head latent
    attention, the memory-efficient kernel, which has no groups of heads.
    """
    if attn_mask is None and value.shape[-1] == query.shape[-1]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    groups = query.shape[-3] // key.shape[-3]
    key, value = (tensor.repeat_interleave(groups, -3) if groups > 1 else tensor for tensor in (key, value))
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:-1], key.shape[-2]).to(query.dtype)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


class _InputKept(torch.autograd.Function):
    """A linear layer that keeps its input although its weight is frozen: LinearFunctionForZeroStage3 of DeepSpeed
    (deepspeed/runtime/zero/linear.py, 0.19.8). Forward only.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias)
        return F.linear(inputs, weight, bias)
