"""Packed linear layers beside torch's own, at the row counts of decoding.

    python -m tests.benchmarks.linear

Prints a table of medians in milliseconds (with --processor-time the least processor time of one thread, where other
work runs on the machine) and, last, one JSON line. The second ratio is that of fp32 packed to int8.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from s2s_ray.kernels import cpu
from s2s_ray.nn.linear import pack_linear

SHAPES = {
    "qkv 512": (512, 1536),
    "up 512": (512, 2048),
    "down 512": (2048, 512),
    "vocabulary 58k": (512, 58_101),
    "up 1024": (1024, 4096),
    "down 1024": (4096, 1024),
}
ROWS = (16, 32, 64, 128)


def milliseconds(runs: list[Callable[[Tensor], Tensor]], x: Tensor, processor_time: bool) -> list[float]:
    """The time of one call of each, run in turn."""
    clock, choose = (time.thread_time, min) if processor_time else (time.perf_counter, statistics.median)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(33):
        for run, each in zip(runs, times, strict=True):
            start = clock()
            run(x)
            each.append((clock() - start) * 1e3)
    return [choose(each[3:]) for each in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor-time", action="store_true")
    processor_time = parser.parse_args().processor_time
    torch.set_num_threads(1 if processor_time else 2)
    cpu.keep_memory()
    results = []
    print(f"{'':16}{'rows':>6}{'torch':>9}{'packed':>9}{'ratio':>8}{'int8':>9}{'ratio':>8}")
    with torch.inference_mode():
        for name, (width, out) in SHAPES.items():
            layer = nn.Linear(width, out)
            runs = [layer, pack_linear(layer), pack_linear(layer, quantization="int8")]
            for rows in ROWS:
                x = torch.randn(rows, width)
                plain, fast, int8 = milliseconds(runs, x, processor_time)
                print(f"{name:16}{rows:6}{plain:9.2f}{fast:9.2f}{plain / fast:7.2f}x{int8:9.2f}{fast / int8:7.2f}x")
                results.append({"layer": name, "rows": rows, "torch_ms": plain, "packed_ms": fast, "int8_ms": int8})
    print(json.dumps({"benchmark": "linear", "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
