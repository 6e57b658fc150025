"""Norms in one pass over memory: T5's, and a layer norm with the residual addition before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = tl.constexpr(torch.finfo(torch.float16).max - 1000)


@triton.jit
def _add_norm(x, y, weight, bias, output, width, epsilon, WIDTH_2: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_2)
    inside = column < width
    a = tl.load(x + row * width + column, inside, other=0.0)
    b = tl.load(y + row * width + column, inside, other=0.0)
    total = (a + b).to(tl.float32)  # rounded to the tensors' dtype first, as an addition of its own would be
    mean = tl.sum(total, axis=0) / width
    centred = tl.where(inside, total - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    normal = centred / tl.sqrt(variance + epsilon)
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, other=0.0).to(tl.float32)
    total = normal * scale + shift
    if output.dtype.element_ty == tl.float16:  # comparisons, since a minimum may drop a NaN
        total = tl.where(total > _MOST, _MOST, tl.where(total < -_MOST, -_MOST, total))
    tl.store(output + row * width + column, total.to(output.dtype.element_ty), inside)


def add_norm(x: Tensor, y: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """`norm(x + y)` for contiguous x and y `[..., D]`, in fp16 kept in range (`nn.norms.clamp_overflow`)."""
    output = torch.empty_like(x)
    width = x.shape[-1]
    _add_norm[(x.numel() // width,)](x, y, norm.weight, norm.bias, output, width, norm.eps, **_launch(width))
    return output


@triton.jit
def _rms_norm(x, weight, output, width, epsilon, WIDTH_2: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_2)
    inside = column < width
    a = tl.load(x + row * width + column, inside, other=0.0).to(tl.float32)
    normal = a * tl.rsqrt(tl.sum(a * a, axis=0) / width + epsilon)
    normal = normal.to(output.dtype.element_ty).to(tl.float32)  # rounded before the weight is applied
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, (normal * scale).to(output.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`nn.norms.RMSNorm` for contiguous x `[..., D]` and weight `[D]` of one dtype."""
    output = torch.empty_like(x)
    width = x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, weight, output, width, epsilon, **_launch(width))
    return output


def _launch(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"WIDTH_2": block, "num_warps": 4 if block <= 2048 else 8}
