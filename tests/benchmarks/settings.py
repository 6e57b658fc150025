"""What each generation setting costs beside plain greedy search, and what rows with settings of their own cost.

    python -m tests.benchmarks.settings --workload translation --rows 128
    python -m tests.benchmarks.settings --device cuda --dtype float16 --workload summarisation --slots 2048

Every output has the same length, whatever the settings, so times compare. The settings take turns; ratios of medians.
Prints a table and, last, one JSON line.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from s2s_ray import models
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.models.loading import DTYPES, build_backbone
from tests.benchmarks.workload import SHAPES, WORKLOADS, make_model, make_rows, special

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "min_length 32": {"min_length": 32},
    "forced first and last token": {"forced_bos_token_id": 5, "forced_eos_token_id": 6},
    "64 banned ids, 8 banned pairs": {
        "suppress_tokens": tuple(range(100, 164)),
        "bad_words_ids": tuple((i, i + 1) for i in range(200, 216, 2)),
    },
    "bart-large-cnn's own": {"no_repeat_ngram_size": 3, "min_length": 56, "forced_bos_token_id": 5},
    "top_k 50": {"do_sample": True, "top_k": 50},
    "top_p 0.9": {"do_sample": True, "top_p": 0.9},
}
MIXED = "a different one of these 7 in each row"  # what needs no other kind of search


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    rows = make_rows(shape, replace(WORKLOADS[args.workload], rows=args.rows))
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(shape, ends=False)
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        cls = models.task_class(config["model_type"]).backbone_cls
        backbone = build_backbone(cls, config, Path(folder), dtype=DTYPES[args.dtype], device=args.device)
    engine = Engine(backbone, max_slots=args.slots)
    ids = special(shape)
    plain = GenerationSettings(
        max_new_tokens=args.new_tokens,
        num_beams=args.num_beams,
        eos_token_id=(ids.end,),
        decoder_start_token_id=ids.start,
        pad_token_id=ids.pad,
    )
    ways = {name: [plain.replace(**changes)] for name, changes in SETTINGS.items()}
    if args.num_beams > 1:
        ways = {name: way for name, way in ways.items() if not way[0].do_sample}
    ways[MIXED] = [way[0] for name, way in ways.items() if not name.startswith("top")]

    def run(way: Sequence[GenerationSettings]) -> float:
        requests = [Request(i, row, way[i % len(way)]) for i, row in enumerate(rows)]
        start = time.perf_counter()
        tokens = sum(len(answer.sequences[0].token_ids) for answer in engine.generate(requests))
        assert tokens == args.rows * args.new_tokens, "an output ended by itself"
        return time.perf_counter() - start

    for way in ways.values():
        run(way[:1])
    gc.collect()
    gc.freeze()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(run(way))
    base = statistics.median(times["greedy"])
    print(f"{'':40}{'seconds':>9}{'of greedy':>11}")
    for name, seconds in times.items():
        print(f"{name:40}{statistics.median(seconds):9.2f}{statistics.median(seconds) / base:11.2f}")
    print(json.dumps({"benchmark": "settings", **vars(args), "seconds": times, "torch": torch.__version__}))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="translation", help="whose sources are taken")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="overrides the workload's")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    args.shape = args.shape or WORKLOADS[args.workload].shape
    args.rows = args.rows or WORKLOADS[args.workload].rows
    return args


if __name__ == "__main__":
    main()
