"""Linear layers, and the packed form of them that generation runs on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Projection = Callable[[Tensor], Tensor]


def pack_linear(*layers: nn.Linear, activation: str = "none") -> Projection:
    """One callable `[N, in] -> [N, sum of outs]` for layers that read the same input, with `activation` fused in.

    A packed layer does not follow later changes of the weights: pack again. `activation` is a key of ACTIVATIONS.
    """
    with torch.no_grad():
        if len(layers) == 1:
            return pack_weight(_weight(layers[0]), layers[0].bias, activation=activation)
        weight = torch.cat([_weight(layer) for layer in layers])
        has_bias = any(layer.bias is not None for layer in layers)
        bias = torch.cat([_bias(layer) for layer in layers]) if has_bias else None
        return pack_weight(weight, bias, activation=activation)


def pack_weight(weight: Tensor, bias: Tensor | None, *, activation: str = "none") -> Projection:
    """As `pack_linear`, for a weight `[out, in]` and a bias `[out]` that stand alone.

    On a CPU in fp32 the weight is stored once in oneDNN's blocked layout, which made products of 16 to 128 rows
    1.1 to 4.3x as fast (docs/performance.md).
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return _pack_onednn(weight, bias, activation)
    activate = ACTIVATIONS[activation]
    return lambda x: activate(F.linear(x, weight, bias))


def _pack_onednn(weight: Tensor, bias: Tensor | None, activation: str) -> Projection:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    attribute, algorithm = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}.get(
        activation, (activation, "")
    )
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, attribute, [], algorithm)


def _weight(layer: nn.Linear) -> Tensor:
    merged = getattr(layer, "merged_weight", None)  # of a layer with LoRA
    return layer.weight if merged is None else merged()


def _bias(layer: nn.Linear) -> Tensor:
    return layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
