"""Generation beside its peers, in turn, on the same rows with the same weights; tokens are compared.

    python -m tests.benchmarks.generate --workload translation --peers transformers,ctranslate2
    python -m tests.benchmarks.generate --workload bart-base --num-beams 5 --rows 16 --peers keras-hub \\
        --keras-python keras-venv/bin/python
    python -m tests.benchmarks.generate --device cuda --dtype bfloat16 --workload summarisation --slots 2048 \\
        --peers transformers,ctranslate2 --caches dynamic static --batch-sizes 128 512

Every peer is tried once with each of its settings; the best of each then runs in turn with us. Prints the sweep, a
table, and last one JSON line. A peer that is not there is named and left out.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from s2s_ray.models.loading import DTYPES
from tests.benchmarks import floor
from tests.benchmarks.peers import PEERS, Contestant, MissingPeerError, Outputs, Task, ours
from tests.benchmarks.profile import print_profile
from tests.benchmarks.stolen import timed
from tests.benchmarks.workload import SHAPES, WORKLOADS, Workload, make_model, make_rows

WARM_UP_ROWS = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.shape]
    work = Workload(**{field.name: getattr(args, field.name) for field in fields(Workload)})
    rows = make_rows(shape, work)
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, ends=not args.fixed_output).save_pretrained(folder)
        task = Task(Path(folder), rows, args)
        chosen, sweep, missing = _sweep(task)
        times, outputs = _measure(chosen, args.repeats)
        if args.profile:
            with chosen[0].enter() as run:
                run(WARM_UP_ROWS)
                print_profile(lambda: run(None), args.device)
    _report(args, rows, times, outputs, {"sweep": sweep, "missing": missing})


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="default", help="a shape and lengths by name")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="this, and the lengths, override the workload's")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--shortest", type=int, help="source tokens")
    parser.add_argument("--longest", type=int, help="source tokens")
    parser.add_argument("--mean-source", type=int, help="tokens")
    parser.add_argument("--mean-output", type=int, help="tokens asked for; the line at the end says what came")
    parser.add_argument("--max-output", type=int, help="tokens")
    parser.add_argument("--uniform-sources", action="store_true", default=None, help="lengths uniform between the two")
    parser.add_argument("--fixed-output", type=int, help="exactly so many new tokens; 0: ragged outputs")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--quantization", choices=("int8",), help="ours, and CTranslate2's compute type")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="at the end, where the time of one run of ours goes")
    ours_ = parser.add_argument_group("our settings")
    ours_.add_argument("--slots", type=int)
    ours_.add_argument("--batch-tokens", type=int)
    peers = parser.add_argument_group("peers and what is swept")
    peers.add_argument("--peers", default="transformers", help=f"of {','.join(PEERS)}, with commas; empty for none")
    peers.add_argument("--sweep-rows", type=int, help="rows of the sweep; all by default")
    peers.add_argument("--batch-sizes", type=int, nargs="*", default=[16, 32, 64], help="of transformers")
    peers.add_argument("--caches", nargs="*", choices=("dynamic", "static"), default=["dynamic"], help="transformers'")
    peers.add_argument("--ct2-batches", nargs="*", default=["examples:32", "tokens:1024", "tokens:4096"])
    peers.add_argument("--keras-batches", type=int, nargs="*", default=[16, 64])
    peers.add_argument("--keras-python", help="the interpreter that has keras-hub; this one by default")
    args = parser.parse_args(arguments)
    for name, value in asdict(WORKLOADS[args.workload]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not args.fixed_output and SHAPES[args.shape].family == "t5":
        parser.error("a T5 needs --fixed-output: it has no way to end by itself here")
    return args


def _sweep(task: Task) -> tuple[list[Contestant], dict[str, float], dict[str, str]]:
    """We and the best of each peer; seconds of all that was tried; the peers that are missing, and why."""
    chosen, seconds, missing = ours(task), {}, {}
    for name in filter(None, task.args.peers.split(",")):
        try:
            tried = PEERS[name](task)
            for contestant in tried:
                with contestant.enter() as run:
                    run(task.args.sweep_rows if contestant.compiled else WARM_UP_ROWS)
                    if len(tried) == 1:
                        continue
                    turn = timed(partial(run, task.args.sweep_rows))
                    seconds[contestant.label] = turn.seconds
                    print(f"sweep, {contestant.label}: {turn}", file=sys.stderr, flush=True)
            chosen += sorted(tried, key=lambda c: seconds.get(c.label, 0.0))[:1]
        except MissingPeerError as error:
            missing[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    return chosen, seconds, missing


def _measure(contestants: list[Contestant], repeats: int) -> tuple[dict[str, list[float]], dict[str, Outputs]]:
    times: dict[str, list[float]] = {c.label: [] for c in contestants}
    outputs: dict[str, Outputs] = {}
    with ExitStack() as stack:
        runs = {c.label: stack.enter_context(c.enter()) for c in contestants}
        for c in contestants:
            runs[c.label](None if c.compiled else WARM_UP_ROWS)
        gc.collect()
        gc.freeze()  # or the collector walks through all that torch and transformers made, in somebody's turn
        for turn in range(repeats):
            for name, run in runs.items():
                took = timed(lambda run=run, name=name: outputs.update({name: run(None)}))
                times[name].append(took.seconds)
                print(f"turn {turn + 1}, {name}: {took}", file=sys.stderr, flush=True)
    gc.unfreeze()  # or nanobind's modules complain at the end
    return times, outputs


def _report(
    args: argparse.Namespace,
    rows: Outputs,
    times: dict[str, list[float]],
    outputs: dict[str, Outputs],
    more: dict[str, Any],
) -> None:
    us = next(iter(times))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    width = max(map(len, times)) + 2
    print(f"{'':{width}}{'seconds':>9}{'rows/s':>9}{'tokens/s':>10}{'ratio':>8}{'rows equal':>12}")
    table = {}
    for name, seconds in medians.items():
        equal = sum(a == b for a, b in zip(outputs[name], outputs[us], strict=True))
        tokens = sum(map(len, outputs[name]))
        ratio = seconds / medians[us]
        rates = f"{args.rows / seconds:9.2f}{tokens / seconds:10.1f}"
        print(f"{name:{width}}{seconds:9.2f}{rates}{ratio:7.2f}x{equal:7}/{args.rows}")
        table[name] = {"seconds": times[name], "median": seconds, "ratio": ratio, "rows_equal": equal, "tokens": tokens}
    least = _floor(args, rows, outputs[us])
    if least:
        share = least["total"] / medians[us]
        print(f"{'floor':{width}}{least['total']:9.2f}{args.rows / least['total']:9.2f}   we are at {share:.0%} of it")
    result = {
        "benchmark": "generate",
        **vars(args),
        "source_tokens": _spread(rows),
        "output_tokens": _spread(outputs[us]),
        "results": table,
        "floor": least,
        "share_of_floor": least["total"] / medians[us] if least else None,
        **more,
        "versions": _versions(),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
    }
    print(json.dumps(result))


def _floor(args: argparse.Namespace, rows: Outputs, outputs: Outputs) -> dict[str, float] | None:
    """Seconds that the machine's own ceilings allow; None for int8, whose products have another one."""
    if args.quantization:
        return None
    peak = floor.measure(args.device, DTYPES[args.dtype])
    slots = args.slots or (128 if args.device == "cpu" else 2048)
    lengths = [len(row) for row in rows], [len(row) for row in outputs]
    least = floor.seconds(SHAPES[args.shape], *lengths, args.num_beams, slots, BYTES[args.dtype], peak)
    return least | {"peak_flops": peak.flops, "peak_bandwidth": peak.bandwidth}


def _spread(rows: Outputs) -> dict[str, float]:
    lengths = [len(row) for row in rows]
    return {"mean": statistics.mean(lengths), "least": min(lengths), "most": max(lengths)}


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("torch", "transformers", "ctranslate2"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


if __name__ == "__main__":
    main()
