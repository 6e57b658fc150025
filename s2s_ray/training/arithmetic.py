"""How much arithmetic training does, beside how much the device could do: model FLOPs utilisation (MFU)."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.layers import DecoderLayer, EncoderLayer


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Floating-point operations of one forward and backward pass: of linear layers for each source and target token,
    and of attention for each pair of tokens. Real tokens count, and no recomputation.
    """

    per_source: float
    per_target: float
    per_source_pair: float
    per_target_pair: float
    per_cross_pair: float

    @classmethod
    def of(cls, backbone: Backbone) -> "Arithmetic":
        """Of a backbone that is not sharded; a frozen weight costs no gradient of its own."""
        encoder = [layer for layer in backbone.encoder_layers if isinstance(layer, EncoderLayer)]
        decoder = [layer for layer in backbone.decoder_layers if isinstance(layer, DecoderLayer)]
        memory = sum(_linear(a.key) + _linear(a.value) for a in (layer.cross_attention for layer in decoder))
        weight, _ = backbone.output_head()
        head = weight.numel() * (6 if weight.requires_grad else 4)
        pairs = [
            sum(12.0 * a.num_heads * a.head_dim for a in attentions)  # scores and values: 2 products, each 6 per pair
            for attentions in (
                [layer.self_attention for layer in encoder],
                [layer.self_attention for layer in decoder],
                [layer.cross_attention for layer in decoder],
            )
        ]
        in_decoder = sum(map(_linear, decoder)) - memory + head
        return cls(sum(map(_linear, encoder)) + memory, in_decoder, pairs[0], pairs[1] / 2, pairs[2])

    def operations(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> float:
        """Of rows with these lengths."""
        s, t = sources.astype(np.float64), targets.astype(np.float64)
        linear = self.per_source * s + self.per_target * t
        attention = self.per_source_pair * s * s + self.per_target_pair * t * t + self.per_cross_pair * s * t
        return float((linear + attention).sum())


def _linear(module: nn.Module) -> float:
    """A token's way through all linear layers of `module`: 2 operations a weight forward, 2 for the gradient of the
    input and 2 for that of the weight.
    """
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return float(sum(layer.weight.numel() * (6 if layer.weight.requires_grad else 4) for layer in layers))


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, measured now: what the device can do at best."""
    on_gpu = device.type == "cuda"
    size, dtype = 8192 if on_gpu else 1024, torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # zeros and ones would take less power, and run faster
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    seconds = []
    for _ in range(10 if on_gpu else 3):
        started = time.perf_counter()
        product: Any = a @ b
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
        del product
    return float(2 * size**3 / median(seconds))
