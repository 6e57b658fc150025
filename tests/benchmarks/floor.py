"""The least time that the arithmetic and the memory of a machine allow a workload, and these two, as measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.benchmarks.workload import Shape


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine reached here: products in FLOP/s, and bytes/s read and written by a copy."""

    flops: float
    bandwidth: float


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device: the best of a few square products and of a few copies, about a second."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b), device)
    copy = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / product, 2 * source.numel() / copy)


def _best(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def seconds(
    shape: Shape, sources: Sequence[int], outputs: Sequence[int], beams: int, slots: int, width: int, peak: Ceilings
) -> dict[str, float]:
    """Seconds of the encoder and of the decoder: sources and outputs in tokens, width in bytes a number.

    The encoder's products run at the peak. A decoding step reads the decoder's weights once for all `slots`, a row's
    source keys and values once for all its beams, and every beam's own; it takes as long as these bytes or as its
    products, whichever is longer. Activations, and whatever is not a product, cost nothing here.
    """
    d, vocabulary = shape.d_model, shape.vocab_size
    feedforward = (3 if shape.family == "t5" else 2) * d * shape.ffn_dim
    encoder_layer, decoder_layer = 4 * d * d + feedforward, 8 * d * d + feedforward
    tokens = sum(sources)
    encoder = 2 * tokens * (shape.layers * encoder_layer + shape.decoder_layers * 2 * d * d)
    encoder += sum(4 * s * s * d * shape.layers for s in sources)
    weights = shape.decoder_layers * (decoder_layer - 2 * d * d) + vocabulary * d  # cross keys and values are made once
    steps = max(max(outputs), sum(outputs) * beams / slots)
    kv = 2 * d * shape.decoder_layers  # numbers per token
    cross = sum(o * s for s, o in zip(sources, outputs, strict=True)) * kv
    own = sum(o * (o + 1) / 2 for o in outputs) * beams * kv
    read = width * (steps * weights + cross + own)
    products = 2 * sum(outputs) * beams * weights + 2 * (cross * beams + own)
    decoder = max(read / peak.bandwidth, products / peak.flops)
    return {"encoder": encoder / peak.flops, "decoder": decoder, "total": encoder / peak.flops + decoder}
