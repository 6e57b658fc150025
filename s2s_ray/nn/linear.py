"""Linear layers, and the packed form of them that generation runs on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.errors import SettingsError
from s2s_ray.kernels import cpu

Projection = Callable[[Tensor], Tensor]
_EPILOGUE_ROWS = 4096
HEAD_MULTIPLE = 64  # the width that cuBLAS' products with the vocabulary need to be fast


def pack_linear(*layers: nn.Linear, activation: str = "none", quantization: str | None = None) -> Projection:
    """One callable `[N, in] -> [N, sum of outs]` for layers that read the same input, with `activation` fused in.

    A packed layer does not follow later changes of the weights: pack again. `activation` is a key of ACTIVATIONS,
    `quantization` None or "int8".
    """
    with torch.no_grad():
        if len(layers) == 1:
            return pack_weight(_weight(layers[0]), layers[0].bias, activation=activation, quantization=quantization)
        weight = torch.cat([_weight(layer) for layer in layers])
        has_bias = any(layer.bias is not None for layer in layers)
        bias = torch.cat([_bias(layer) for layer in layers]) if has_bias else None
        return pack_weight(weight, bias, activation=activation, quantization=quantization)


def pack_weight(
    weight: Tensor, bias: Tensor | None, *, activation: str = "none", quantization: str | None = None
) -> Projection:
    """As `pack_linear`, for a weight `[out, in]` and a bias `[out]` that stand alone.

    On a CPU in fp32 the weight is stored once in panels, or without the compiled kernels in oneDNN's blocked layout
    (docs/performance.md has the times of both). int8 is for fp32 on a CPU; elsewhere SettingsError is raised.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if quantization is not None:
        check_quantization(quantization, weight.device, weight.dtype)
        return cpu.pack_int8(weight, bias, activation=activation)
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        if cpu.has_float():
            return cpu.pack_float(weight, bias, activation=activation)
        if torch.backends.mkldnn.is_available():
            return _pack_onednn(weight, bias, activation)
    activate = ACTIVATIONS[activation]
    if weight.device.type == "cuda" and weight.dtype != torch.float32 and bias is not None and "gelu" in activation:
        return _with_gelu_epilogue(weight, bias, activate)
    return lambda x: activate(F.linear(x, weight, bias))


def check_quantization(quantization: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise SettingsError for a quantization that there is not, or not for this device and dtype."""
    if quantization not in (None, "int8"):
        raise SettingsError(f"quantization must be 'int8' or None. Received: {quantization!r}")
    if quantization is not None and (device.type, dtype) != ("cpu", torch.float32):
        raise SettingsError(
            f"quantization='int8' is for float32 weights on a CPU. Received: {dtype} on {device}; "
            "on a GPU choose dtype='bfloat16' or 'float16'"
        )


def _with_gelu_epilogue(weight: Tensor, bias: Tensor, activate: Callable[[Tensor], Tensor]) -> Projection:
    """cuBLAS applies its tanh GELU before it rounds, which in bf16 lies nearer to the erf form in double precision
    (mean error 0.7e-3 against 1.0e-3) than an activation of its own, and makes products of many rows 1.3x as fast.
    """

    def run(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows < _EPILOGUE_ROWS:
            return activate(F.linear(x, weight, bias))
        product = torch.ops.aten._addmm_activation(bias, x.reshape(rows, -1), weight.t(), use_gelu=True)
        return product.unflatten(0, x.shape[:-1])

    return run


def pack_head(weight: Tensor, bias: Tensor | None, quantization: str | None = None) -> Projection:
    """As `pack_weight`, for the projection to the vocabulary, whose width is brought to a multiple of 64 by tokens of
    score -inf: cuBLAS took 2.8 ms for 4,096 rows of a vocabulary of 58,101, and takes 0.4 for 58,112 (H200, bf16).
    """
    missing = -weight.shape[0] % HEAD_MULTIPLE
    if missing and weight.device.type == "cuda":
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        weight = F.pad(weight, (0, 0, 0, missing))
        bias = F.pad(bias, (0, missing), value=float("-inf"))
    return pack_weight(weight, bias, quantization=quantization)


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
