"""Speculative beside greedy decoding on the built-in summariser and its sample: equal texts, tokens a step, time.

    python -m tests.benchmarks.speculative --rows 64 --slots 1 4 16 64

Guesses come from the rows' sources, and from the same model with fewer decoder layers (an untrained draft: what an
early exit alone gives). Prints a table and, last, one JSON line. The processor's seconds are the ones to read on a
machine that is shared.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.speculative import Speculation
from s2s_ray.models.backbone import Backbone
from s2s_ray.pipelines.command import SAMPLE


def shallow(task: Seq2SeqLM, preset: str) -> Backbone:
    """The task's network with the first decoder layer alone."""
    draft = Seq2SeqLM.from_preset(preset, device=task.device).backbone
    draft.decoder_layers = draft.decoder_layers[:1]
    return draft


def measure(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Seconds, the processor's seconds, and how many tokens a live row got a step."""
    before = dataclasses.replace(engine.stats)
    start, busy = time.perf_counter(), time.process_time()
    answers = {a.request.row_id: a.sequences[0].token_ids for a in engine.generate(requests)}
    stats = engine.stats
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - busy,
        "tokens_per_step": (stats.generated_tokens - before.generated_tokens)
        / (stats.live_slot_steps - before.live_slot_steps),
        "tokens": [answers[request.row_id] for request in requests],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debian_summarizer_en")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16, 64], help="rows decoded at one time")
    parser.add_argument("--tokens", type=int, nargs="+", default=[3, 5], help="guesses a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    task = Seq2SeqLM.from_preset(args.preset, device=args.device)
    first = min(Path(SAMPLE).glob("*.parquet"))
    texts = pq.ParquetFile(first).read(columns=["description"]).column("description").to_pylist()[: args.rows]
    sources = task.preprocessor.encode_sources(texts)[0]  # type: ignore[union-attr]
    settings = task.generation_settings.replace(num_beams=1, do_sample=False)
    requests = [Request(i, source, settings) for i, source in enumerate(sources)]
    ways: dict[str, Speculation | None] = {"greedy": None}
    for count in args.tokens:
        ways[f"source, {count}"] = Speculation(count)
        ways[f"one layer, {count}"] = Speculation(count, shallow(task, args.preset))
    table = []
    print(f"{'guesses':16}{'slots':>6}{'seconds':>9}{'CPU s':>8}{'of greedy':>11}{'tokens/step':>13}{'rows equal':>12}")
    for slots in args.slots:
        base: dict[str, Any] = {}
        for name, speculation in ways.items():
            engine = Engine(task.backbone, max_slots=slots, speculation=speculation)
            measure(engine, requests[:2])
            found = measure(engine, requests)
            tokens = found.pop("tokens")
            base = base or {**found, "tokens": tokens}
            equal = sum(a == b for a, b in zip(tokens, base["tokens"], strict=True))
            share = found["processor_seconds"] / base["processor_seconds"]
            print(
                f"{name:16}{slots:6}{found['seconds']:9.1f}{found['processor_seconds']:8.1f}{share:11.2f}"
                f"{found['tokens_per_step']:13.2f}{equal:8}/{len(requests)}",
                flush=True,
            )
            table.append({"guesses": name, "slots": slots, **found, "rows_equal": equal, "share_of_greedy": share})
    print(json.dumps({"benchmark": "speculative", **vars(args), "results": table, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
