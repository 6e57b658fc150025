"""What a replica costs before and while it works: seconds until the first row is out, and memory by slots and batch.

    python -m tests.benchmarks.footprint --workload translation --rows 64
    python -m tests.benchmarks.footprint --device cuda --dtype float16 --workload summarisation --slots 256 1024 2048

Each line is a process of its own. The first two find no compiled kernel on the disk, and those of the first: what the
first actor of a node and the others pay. Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2s_ray.models.loading import DTYPES
from tests.benchmarks.peers import Task, ours
from tests.benchmarks.workload import SHAPES, WORKLOADS, make_model, make_rows

GIB = 2**30
COLUMNS = ("load", "first_row", "second_row", "all", "peak_gib", "held_gib")


def child(args: Namespace) -> None:
    """One engine: load, one row, one row more, all rows; prints one JSON line."""
    shape = SHAPES[args.shape]
    work = replace(WORKLOADS[args.workload], rows=args.rows)
    defaults = {"num_beams": 1, "quantization": None, "threads": 2, "batch_tokens": None}
    settings = Namespace(**defaults | {"fixed_output": work.fixed_output, "max_output": work.max_output} | vars(args))
    cuda = args.device == "cuda"
    began = time.perf_counter()
    with ours(Task(args.folder, make_rows(shape, work), settings))[0].enter() as run:
        times = [time.perf_counter() - began]
        for count in (1, 1, None):
            start = time.perf_counter()
            run(count)
            times.append(time.perf_counter() - start)
    peak, held = torch.cuda.max_memory_allocated() if cuda else 0, torch.cuda.max_memory_reserved() if cuda else 0
    if not cuda:
        peak = held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(zip(COLUMNS, [*times, peak / GIB, held / GIB], strict=True))))


def measured(args: Namespace, folder: Path, slots: int, batch_tokens: int | None, cache: Path) -> dict[str, Any]:
    """The figures of a child with these settings, which keeps its compiled kernels in `cache`."""
    given = {"slots": slots, "batch_tokens": batch_tokens, "folder": str(folder)}
    command = [sys.executable, "-m", "tests.benchmarks.footprint", "--child", json.dumps(vars(args) | given)]
    places = {"TRITON_CACHE_DIR": str(cache / "triton"), "XDG_CACHE_HOME": str(cache), "S2S_RAY_CACHE": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | places)
    return {"slots": slots, "batch_tokens": batch_tokens, **json.loads(done.stdout.splitlines()[-1])}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="translation")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch-tokens", type=int, nargs="*", default=[], help="with the last number of slots")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        settings = Namespace(**json.loads(args.child))
        settings.folder = Path(settings.folder)
        child(settings)
        return
    args.shape, args.rows = WORKLOADS[args.workload].shape, args.rows or WORKLOADS[args.workload].rows
    del args.child
    table = []
    print(f"{'slots':>6}{'tokens':>8}" + "".join(f"{name:>11}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch) / "model", Path(scratch) / "cache"
        make_model(SHAPES[args.shape], ends=not WORKLOADS[args.workload].fixed_output).save_pretrained(folder)
        runs = [(args.slots[0], None), *((slots, None) for slots in args.slots)]
        runs += [(args.slots[-1], tokens) for tokens in args.batch_tokens]
        for slots, tokens in runs:
            table.append(measured(args, folder, slots, tokens, cache))
            figures = "".join(f"{table[-1][name]:11.2f}" for name in COLUMNS)
            print(f"{slots:6}{tokens or 'auto':>8}{figures}", flush=True)
    print(json.dumps({"benchmark": "footprint", **vars(args), "results": table, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
