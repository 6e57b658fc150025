"""Packed linear layers beside torch's own, at the row counts of decoding.

    python -m tests.benchmarks.linear

Prints a table of medians in milliseconds and, last, one JSON line.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2s_ray.nn.linear import pack_linear

SHAPES = {"qkv 512": (512, 1536), "up 512": (512, 2048), "down 512": (2048, 512), "vocabulary 58k": (512, 58_101)}
ROWS = (16, 64, 128)


def median_ms(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 30) -> float:
    """The median time of one call, in milliseconds."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run(x)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


def main() -> None:
    torch.set_num_threads(2)
    results = []
    print(f"{'':16}{'rows':>6}{'torch':>9}{'packed':>9}{'ratio':>8}")
    with torch.inference_mode():
        for name, (width, out) in SHAPES.items():
            layer = nn.Linear(width, out)
            packed = pack_linear(layer)
            for rows in ROWS:
                x = torch.randn(rows, width)
                plain, fast = median_ms(layer, x), median_ms(packed, x)
                print(f"{name:16}{rows:6}{plain:9.2f}{fast:9.2f}{plain / fast:7.2f}x")
                results.append({"layer": name, "rows": rows, "torch_ms": plain, "packed_ms": fast})
    print(json.dumps({"benchmark": "linear", "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
