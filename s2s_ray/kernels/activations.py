"""The gated activation of a feed-forward block, in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(1024)
_KINDS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


@triton.jit
def _gated(joint, output, width, KIND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = column < width
    place = joint + row * 2 * width + column
    gate = tl.load(place, inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, inside, other=0.0).to(tl.float32)
    if KIND == 1:
        gate = tl.where(gate < 0.0, 0.0, gate)
    elif KIND == 2:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == 3:  # 1 + tanh(z) is twice the sigmoid of 2 z
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif KIND == 4:
        gate = gate * tl.sigmoid(gate)
    dtype = output.dtype.element_ty
    tl.store(output + row * width + column, (gate.to(dtype).to(tl.float32) * up).to(dtype), inside)


def gated(joint: Tensor, activation: str) -> Tensor:
    """joint `[N, 2 F]`, contiguous, gates and then values, to activation(gates) * values `[N, F]`.

    activation: a key of `nn.linear.ACTIVATIONS`. The activated gate is rounded to the dtype before the product.
    """
    rows, width = joint.shape[0], joint.shape[1] // 2
    output = torch.empty(rows, width, dtype=joint.dtype, device=joint.device)
    _gated[(rows, triton.cdiv(width, _BLOCK.value))](joint, output, width, KIND=_KINDS[activation], num_warps=4)
    return output
