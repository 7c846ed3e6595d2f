"""The perturbation x + ε of the sampled layers: its scale, how it reaches low-precision weights, its exact undoing.

Everything here works on local tensors of one rank and knows nothing of other ranks.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from slsam_ds.config import Rounding
from slsam_ds.rng import seed_of

# Perturbing happens in pieces of this many elements, so that the float32 temporaries of a large layer stay small: on
# the CPU, within its caches.
_CHUNK_NUMEL = 2**24
_CHUNK_NUMEL_ON_CPU = 2**17


def rounding_generator(device: torch.device, *key: int) -> torch.Generator:
    """Random generator that is a pure function of `key` (seed, step, owner, piece): resume repeats it."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


# How many of float32's bits a dtype lacks at the lower end.
_BITS_CUT = {torch.bfloat16: 16, torch.float16: 13}


def stochastic_round(values: Tensor, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Round float32 to a dtype of 16 bits, up or down with probability proportional to nearness: exact in expectation.

    A perturbation is per element far below half a bf16 ulp of a typical weight: rounding to nearest loses a quarter of
    it at 1e7 parameters and half at 5e7, stochastic rounding loses nothing.

    Args:
        values: float32, any shape, finite.
        generator: On the device of `values`.
        dtype: bfloat16 or float16.

    Returns:
        `dtype`, of the same shape. float16 below its normal range (6e-5) is rounded to the nearest, 3e-8 away at most.
    """
    # Both keep the upper bits of a float32's mantissa: adding uniform noise below the cut and truncating rounds up with
    # the right probability, and carries into the exponent where it must.
    cut = 2 ** _BITS_CUT[dtype]
    bits = values.contiguous().view(torch.int32)
    # Four of them from each draw of 64 bits: drawing is what takes time on the CPU.
    draws = torch.empty(math.ceil(bits.numel() / 4), dtype=torch.int64, device=values.device)
    draws.random_(-(2**63), None, generator=generator)
    noise = draws.view(torch.int16)[: bits.numel()].view(bits.shape).to(torch.int32).bitwise_and_(cut - 1)
    return noise.add_(bits).bitwise_and_(-cut).view(torch.float32).to(dtype)


def perturb_(
    weight: Tensor,
    master: Tensor,
    gradient: Tensor,
    *,
    scale: Tensor,
    rounding: Rounding,
    generator: torch.Generator,
    read_dtype: torch.dtype | None = None,
) -> Tensor:
    """Move `weight` to weight + ε in place, where ε = scale · gradient; 0 where the scale is, whatever the gradient.

    Stochastic rounding starts from the value that forward reads, so an element without gradient does not move;
    rounding to nearest starts from the master weight, without which ε would vanish below half an ulp. A float32 weight
    that forward reads with 16 bits is written on their grid, which the later cast keeps as it is.

    Args:
        weight: What forward reads, or casts to `read_dtype` and reads. float32, bfloat16 or float16, 1-D.
        master: The same elements in full precision (may be `weight` itself, or on another device). 1-D.
        gradient: The same elements of the ascent gradient, on any device. 1-D.
        scale: rho / global gradient norm, over the loss scale where the gradient has one. Shape (), on any device.
        rounding: How ε reaches weights that forward reads with 16 bits; float32 needs none.
        generator: Source of the rounding noise, on the device of `weight`.
        read_dtype: Dtype in which forward reads the weight; None: its own.

    Returns:
        Local ⟨applied, ε⟩ and ‖applied‖² of the change that forward sees, and ‖ε‖². Shape (3,), float64.
    """
    read_dtype = read_dtype or weight.dtype
    scale = scale.to(weight.device, torch.float32)
    stays = scale == 0
    measured = torch.zeros(3, dtype=torch.float64, device=weight.device)
    size = _CHUNK_NUMEL_ON_CPU if weight.device.type == "cpu" else _CHUNK_NUMEL
    chunks = zip(*(torch.split(tensor, size) for tensor in (weight, master, gradient)), strict=True)
    for weight_chunk, master_chunk, gradient_chunk in chunks:
        # Moved first, then cast: torch would cast on the host, and move twice as much.
        epsilon = (gradient_chunk.to(weight.device).float() * scale).masked_fill_(stays, 0.0)
        before = weight_chunk.to(read_dtype).to(torch.float32, copy=True)
        if read_dtype in _BITS_CUT and rounding == "stochastic":
            weight_chunk.copy_(stochastic_round(before + epsilon, generator, read_dtype))
        elif master is weight and weight.dtype == torch.float32:
            weight_chunk.add_(epsilon)
        else:
            weight_chunk.copy_(master_chunk.to(weight.device).float() + epsilon)
        applied = before.neg_().add_(weight_chunk.to(read_dtype))
        dots = torch.dot(applied, epsilon), torch.dot(applied, applied), torch.dot(epsilon, epsilon)
        measured += torch.stack(dots)
    return measured


def scale_(tensors: list[Tensor], factor: float) -> None:
    """Multiply tensors in place. On the CPU, `torch._foreach_mul_` rounds the factor to 16 bits where they have 16."""
    if all(tensor.dtype == torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        if tensors:
            torch._foreach_mul_(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


@contextlib.contextmanager
def preserved(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the tensors back bit for bit on the way out, whatever happened inside.

    A copy, not a subtraction: (w + ε) - ε is not w in floating point. Values are copied back into the same storage,
    which views and flat buffers of a sharded engine share.
    """
    live = [tensor.detach() for tensor in tensors]
    originals = [torch.empty_like(tensor) for tensor in live]
    if live:
        torch._foreach_copy_(originals, live)
    try:
        yield
    finally:
        if live:
            torch._foreach_copy_(live, originals)
