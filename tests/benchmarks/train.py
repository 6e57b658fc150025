"""Training beside transformers, in turn, on the same rows with the same weights: real tokens a second, MFU, memory.

    python -m tests.benchmarks.train --shape bart-large --device cuda --steps 30 --repeats 3
    python -m tests.benchmarks.train --shape tiny --device cpu --steps 5 --batch-tokens 4096 --peer-rows 8

One process, no Ray: forward, backward, clipping and a fused AdamW, under bf16 autocast with fp32 weights. The peer gets
batches of rows of like length (as its Trainer's `group_by_length`), sdpa, and each batch size given; we get each token
budget given. MFU is the model's arithmetic on real tokens over the rate of a large bf16 (CPU: fp32) matrix product
measured in this run. Prints a table and, last, one JSON line.
"""

import argparse
import contextlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from s2s_ray.models.bart import BartBackbone
from s2s_ray.training.batches import BatchPlan, Examples, Ragged
from s2s_ray.training.feed import on_device
from s2s_ray.training.optimizers import OptimizerSettings, build_optimizer
from s2s_ray.training.step import Totals, TrainStep

SHAPES = {  # d_model, layers a side, ffn, heads, vocabulary
    "tiny": (64, 2, 128, 4, 2_000),
    "bart-base": (768, 6, 3072, 12, 50_265),
    "bart-large": (1024, 12, 4096, 16, 50_265),
}
MAX_SOURCE, MAX_TARGET = 1024, 142
Run = Callable[[int], tuple[int, int, float]]  # steps to (real tokens, padded tokens, operations)


def make_config(name: str) -> dict[str, Any]:
    d, layers, ffn, heads, vocabulary = SHAPES[name]
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", layers), ("ffn_dim", ffn), ("attention_heads", heads))
    }
    return {
        "model_type": "bart", "d_model": d, "vocab_size": vocabulary, "max_position_embeddings": MAX_SOURCE,
        "dropout": 0.1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, **sides,
    }  # fmt: skip


def make_rows(count: int, vocabulary: int, seed: int = 0) -> Examples:
    """Sources of log-normal length, mean 600, and targets, mean 60; uniform tokens."""
    generator = np.random.default_rng(seed)

    def side(mean: int, spread: float, longest: int) -> Ragged:
        lengths = generator.lognormal(math.log(mean) - spread**2 / 2, spread, count).clip(8, longest).astype(np.int64)
        return Ragged(generator.integers(4, vocabulary, int(lengths.sum())).astype(np.int32), lengths)

    return Examples(side(600, 0.6, MAX_SOURCE), side(60, 0.5, MAX_TARGET), 2, 1)


def operations(name: str, sources: Any, targets: Any) -> float:
    """Floating-point operations of one step on rows of these real lengths: three times those of the forward pass."""
    d, layers, ffn, _, vocabulary = SHAPES[name]
    s, t = sources.astype(np.float64), targets.astype(np.float64)
    linear = layers * (s * (4 * d * d + 2 * d * ffn) + t * (6 * d * d + 2 * d * ffn) + s * 2 * d * d)
    attention = layers * 2 * d * (s * s + t * t / 2 + s * t)
    return float(3 * 2 * (linear + attention + t * vocabulary * d).sum())


def make_ours(args: argparse.Namespace, rows: Examples, state: dict[str, torch.Tensor], tokens: int) -> Run:
    """`TrainStep` on token-bucketed batches."""
    backbone = BartBackbone(make_config(args.shape)).to(args.device).train()
    theirs = {ours: state[backbone.checkpoint_name(ours)] for ours in backbone.state_dict()}
    backbone.load_state_dict(theirs)
    settings = OptimizerSettings(name="adamw", learning_rate=1e-5, clip_norm=1.0, weight_decay=0.01)
    optimizer, _ = build_optimizer(settings, backbone, None)
    precision: Any = "bf16" if args.device == "cuda" else "fp32"
    step = TrainStep(backbone, optimizer, clip_norm=1.0, precision=precision)
    lengths = rows.sources.lengths, rows.labels.lengths
    plan = BatchPlan(*lengths, batch_tokens=tokens, multiple=8)
    device = torch.device(args.device)

    def batches() -> Iterator[Any]:
        while True:
            for chosen in plan:
                batch = rows.collate(chosen, plan.multiple)
                counted.append((batch.real_tokens, batch.padded_tokens,
                                operations(args.shape, lengths[0][chosen], lengths[1][chosen])))  # fmt: skip
                yield batch

    counted: list[tuple[int, int, float]] = []
    stream = on_device(batches(), device)
    done = 0

    def run(steps: int) -> tuple[int, int, float]:
        nonlocal done
        totals = Totals()
        for _ in range(steps):
            step([next(stream)], totals)
        step.check_finite(totals.results())  # waits for the device
        mine = counted[done : done + steps]
        done += steps
        return tuple(map(sum, zip(*mine, strict=True)))  # type: ignore[return-value]

    return run


def make_theirs(args: argparse.Namespace, rows: Examples, model: Any, size: int) -> Run:
    """transformers in the loop that its Trainer runs."""
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=args.device == "cuda")
    lengths = rows.sources.lengths, rows.labels.lengths
    generator = np.random.default_rng(0)
    order = generator.permutation(len(rows))
    groups = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    ordered = np.concatenate([group[np.argsort(-lengths[0][group])] for group in groups])
    batches = [ordered[i : i + size] for i in range(0, len(ordered) - size + 1, size)]
    generator.shuffle(batches)
    place = 0

    def run(steps: int) -> tuple[int, int, float]:
        nonlocal place
        counts = np.zeros(3)
        autocast: Any = contextlib.nullcontext()
        if args.device == "cuda":
            autocast = torch.autocast("cuda", torch.bfloat16)
        loss = torch.zeros(())
        for _ in range(steps):
            chosen = batches[place % len(batches)]
            place += 1
            batch = rows.collate(chosen, 8)
            counts += (batch.real_tokens, batch.padded_tokens,
                       operations(args.shape, lengths[0][chosen], lengths[1][chosen]))  # fmt: skip
            batch = (batch.pin() if args.device == "cuda" else batch).to(torch.device(args.device), non_blocking=True)
            with autocast:
                loss = model(
                    input_ids=batch.inputs["encoder_token_ids"],
                    attention_mask=batch.inputs["encoder_padding_mask"],
                    labels=batch.labels.masked_fill(batch.weights == 0, -100),
                ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())
        return int(counts[0]), int(counts[1]), float(counts[2])

    return run


def matrix_rate(device: str) -> float:
    """Operations a second of a large matrix product: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def measure(name: str, make: Callable[[], Run], args: argparse.Namespace) -> dict[str, Any]:
    """One competitor alone on the device: warm-up, then `repeats` timings."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        run = make()
        run(max(2, args.steps // 4))
        timings = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            real, padded, flops = run(args.steps)
            timings.append((time.perf_counter() - started, real, padded, flops))
    except torch.OutOfMemoryError:
        return {"name": name, "tokens_per_second": 0.0, "out_of_memory": True}
    rates = [real / seconds for seconds, real, _, _ in timings]
    return {
        "name": name,
        "tokens_per_second": statistics.median(rates),
        "all": rates,
        "mfu": statistics.median(flops / seconds for seconds, _, _, flops in timings) / args.matrix_rate,
        "padding": 1 - sum(t[1] for t in timings) / sum(t[2] for t in timings),
        "milliseconds_a_step": statistics.median(t[0] for t in timings) / args.steps * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bart-large")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[16_384, 32_768, 65_536])
    parser.add_argument("--peer-rows", type=int, nargs="*", default=[16, 32, 64])
    args = parser.parse_args()
    from transformers import BartConfig, BartForConditionalGeneration

    args.matrix_rate = matrix_rate(args.device)
    rows = make_rows(args.rows, SHAPES[args.shape][-1])
    torch.manual_seed(0)

    def peer() -> Any:
        torch.manual_seed(0)
        return BartForConditionalGeneration(BartConfig(**make_config(args.shape), attn_implementation="sdpa"))

    state = {name: tensor.clone() for name, tensor in peer().state_dict().items()}
    results = [
        measure(f"s2s_ray, {n} tokens", lambda n=n: make_ours(args, rows, state, n), args) for n in args.batch_tokens
    ]
    results += [
        measure(f"transformers, {n} rows", lambda n=n: make_theirs(args, rows, peer(), n), args) for n in args.peer_rows
    ]
    print(f"{'':<26}{'tokens/s':>10}{'MFU':>8}{'padding':>9}{'ms/step':>9}{'GiB':>7}")
    for r in results:
        if r.get("out_of_memory"):
            print(f"{r['name']:<26}{'out of memory':>20}")
            continue
        memory = f"{r['peak_gib']:.1f}" if r["peak_gib"] is not None else "-"
        print(
            f"{r['name']:<26}{r['tokens_per_second']:>10.0f}{r['mfu']:>8.1%}{r['padding']:>9.1%}"
            f"{r['milliseconds_a_step']:>9.0f}{memory:>7}"
        )
    best = {who: max((r["tokens_per_second"] for r in results if r["name"].startswith(who)), default=0.0)
            for who in ("s2s_ray", "transformers")}  # fmt: skip
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    summary = {"benchmark": "train", "shape": args.shape, "device": device, "torch": torch.__version__,
               "matrix_rate_tflops": args.matrix_rate / 1e12, "results": results,
               "ratio": best["s2s_ray"] / best["transformers"] if best["transformers"] else None}  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
