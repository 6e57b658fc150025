"""Generation beside its peers, in turn, on the same rows with the same weights; tokens are compared.

    python -m tests.benchmarks.generate --shape marian --rows 256 --repeats 3

Prints a table and, last, one JSON line. The peers get sorted input and the best of the batch sizes given.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from s2s_ray.generation.engine import Engine
from s2s_ray.generation.requests import Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.models.bart import BartBackbone
from s2s_ray.models.loading import DTYPES
from tests.benchmarks.workload import SHAPES, make_model, make_rows

Outputs = list[list[int]]
Run = Callable[..., Outputs]  # over all rows, or the first so many
WARM_UP_ROWS = 4


def ours(model: Any, rows: Outputs, settings: GenerationSettings, args: argparse.Namespace) -> Run:
    """The engine on the same weights."""
    backbone = BartBackbone(model.config.to_dict()).eval()
    names = {name: backbone.checkpoint_name(name) for name in backbone.state_dict()}
    theirs = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    backbone.load_state_dict({ours: theirs[name] for ours, name in names.items()})
    backbone.to(device=args.device, dtype=DTYPES[args.dtype])
    engine = Engine(backbone, max_slots=args.slots, max_batch_tokens=args.batch_tokens)

    def run(count: int | None = None) -> Outputs:
        answers = engine.generate(Request(i, row, settings) for i, row in enumerate(rows[:count]))
        return [a.sequences[0].token_ids for a in sorted(answers, key=lambda answer: answer.request.row_id)]

    return run


def transformers(model: Any, rows: Outputs, settings: GenerationSettings, batch: int) -> Run:
    """`transformers.generate` over batches of rows sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))

    def run(count: int | None = None) -> Outputs:
        outputs: Outputs = [[] for _ in rows]
        for start in range(0, count or len(rows), batch):
            chosen = order[start : start + (count or batch)]
            width = max(len(rows[i]) for i in chosen)
            ids = torch.full((len(chosen), width), 1)
            for place, i in enumerate(chosen):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
            lengths = torch.tensor([len(rows[i]) for i in chosen])
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=(torch.arange(width) < lengths[:, None]).long().to(model.device),
                max_length=settings.max_length,
                num_beams=settings.num_beams,
                do_sample=False,
            ).tolist()
            for i, row in zip(chosen, made, strict=True):
                ends = settings.eos_token_id and 2 in row[1:]
                outputs[i] = row[1 : row.index(2, 1) + 1] if ends else row[1:]
        return outputs

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="marian")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--shortest", type=int, default=5, help="source tokens")
    parser.add_argument("--longest", type=int, default=300, help="source tokens")
    parser.add_argument("--mean-source", type=int, default=80, help="tokens")
    parser.add_argument(
        "--mean-output", type=int, default=45, help="tokens asked for; the line at the end says what came"
    )
    parser.add_argument("--max-output", type=int, default=142, help="tokens")
    parser.add_argument("--uniform-sources", action="store_true", help="lengths uniform between the two")
    parser.add_argument("--fixed-output", type=int, help="exactly so many new tokens, in place of ragged outputs")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 32, 64], help="tried for transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", type=int)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    model = make_model(shape).to(device=args.device, dtype=DTYPES[args.dtype])
    lengths = {"shortest": args.shortest, "longest": args.longest, "mean_source": args.mean_source}
    rows = make_rows(shape, args.rows, **lengths, mean_output=args.mean_output, uniform=args.uniform_sources)
    settings = GenerationSettings(
        max_length=1 + (args.fixed_output or args.max_output),
        num_beams=args.num_beams,
        eos_token_id=() if args.fixed_output else (2,),
        decoder_start_token_id=0,
        pad_token_id=1,
    )
    if args.fixed_output:
        model.generation_config.eos_token_id = None
    contestants = {"s2s_ray": ours(model, rows, settings, args)}
    contestants |= {f"transformers, batch {b}": transformers(model, rows, settings, b) for b in args.batch_sizes}
    times, outputs = _measure(contestants, args.repeats)
    counts = [len(row) for row in rows]
    sources = {"mean": statistics.mean(counts), "least": min(counts), "most": max(counts)}
    _report(args, sources, times, outputs)


def _measure(contestants: dict[str, Run], repeats: int) -> tuple[dict[str, list[float]], dict[str, Outputs]]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for warm_up in contestants.values():
        warm_up(WARM_UP_ROWS)
    outputs: dict[str, Outputs] = {}
    for turn in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            outputs[name] = run()
            times[name].append(time.perf_counter() - start)
            print(f"turn {turn + 1}, {name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return times, outputs


def _report(
    args: argparse.Namespace, sources: dict[str, float], times: dict[str, list[float]], outputs: dict[str, Outputs]
) -> None:
    reference = outputs["s2s_ray"]
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    lengths = [len(row) for row in reference]
    tokens = sum(lengths)
    print(f"{'':26}{'seconds':>9}{'rows/s':>9}{'tokens/s':>10}{'ratio':>8}{'rows equal':>12}")
    table = {}
    for name, seconds in medians.items():
        equal = sum(a == b for a, b in zip(outputs[name], reference, strict=True))
        ratio = seconds / medians["s2s_ray"]
        rates = f"{args.rows / seconds:9.2f}{tokens / seconds:10.1f}"
        print(f"{name:26}{seconds:9.2f}{rates}{ratio:7.2f}x{equal:8}/{args.rows}")
        table[name] = {"seconds": times[name], "median": seconds, "ratio": ratio, "rows_equal": equal}
    best = min((n for n in medians if n != "s2s_ray"), key=lambda n: medians[n], default=None)
    result = {
        "benchmark": "generate",
        **vars(args),
        "source_tokens": sources,
        "output_tokens": {"mean": statistics.mean(lengths), "least": min(lengths), "most": max(lengths)},
        "results": table,
        "best_peer": best,
        "speedup": medians[best] / medians["s2s_ray"] if best else None,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
