"""Several GPUs beside one: DDP over NCCL in processes of this script, no Ray."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from s2s_ray.training.arithmetic import matrix_rate
from tests.benchmarks.train import make_rows, measure, ours, show


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Our best budget on one worker and on `--gpus` of them, each with that budget; the ratio of tokens a second."""
    results = []
    for size in (1, args.gpus):
        with tempfile.TemporaryDirectory() as name:
            torch.multiprocessing.spawn(worker, (size, args, name), nprocs=size)
            results.append(json.loads((Path(name) / "result").read_text()))
        show(results[-1])
    one, many = (result["tokens_per_second"] for result in results)
    return {"benchmark": "train --gpus", "shape": args.shape, "results": results, "ratio": many / one if one else None}


def worker(rank: int, size: int, args: argparse.Namespace, directory: str) -> None:
    """One process of the group."""
    if args.device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))  # of the feed; else each takes all cores
    else:
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    store = f"file://{directory}/store"
    device = torch.device("cuda", rank) if args.device == "cuda" else None
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, device_id=device)
    args.gpus = size
    args.matrix_rate = matrix_rate(torch.device(args.device), "bf16" if args.device == "cuda" else "fp32")
    tokens = (args.compiled_tokens or args.batch_tokens)[0]
    opened = ours(args, make_rows(args), None, tokens, compiled=bool(args.compiled_tokens))
    result = measure(f"s2s_ray, {tokens} tokens, {size} workers", opened, args)
    if rank == 0:
        (Path(directory) / "result").write_text(json.dumps(result))
    time.sleep(0.5)  # all have read the store
    dist.destroy_process_group()
