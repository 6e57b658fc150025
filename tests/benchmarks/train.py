"""Training beside transformers, in turn, on the same rows with the same weights: real tokens a second, MFU, memory.

    python -m tests.benchmarks.train --shape bart-large --device cuda --steps 30 --repeats 3
    python -m tests.benchmarks.train --shape bart-large --gpus 2 --profile
    python -m tests.benchmarks.train --shape bart-base --device cuda --check
    python -m tests.benchmarks.train --shape tiny --device cpu --steps 5 --batch-tokens 4096 --peer-rows 8

No Ray: forward, backward, clipping and AdamW, on a GPU fused and under bf16 autocast with fp32 weights. The peer gets
batches of rows of like length (as its Trainer's `group_by_length`), sdpa, and each batch size given; we get each token
budget given, and those of `--compiled-tokens` with compiled layers. MFU is the model's arithmetic on real tokens over
the rate of a large bf16 (CPU: fp32) matrix product measured in this run.

A competitor's line is printed, as a table row and as JSON, when it is done, so that a run that is cut still says what
it found; `--limit-seconds` leaves out what would begin after that. The last line is one JSON object of everything.
"""

import argparse
import contextlib
import copy
import gc
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
from s2s_ray.models.loading import initialise
from s2s_ray.training.arithmetic import matrix_rate
from s2s_ray.training.batches import Batch, BatchPlan, Examples, Ragged
from s2s_ray.training.distributed import World, compile_layers, distribute
from s2s_ray.training.feed import on_device
from s2s_ray.training.optimizers import OptimizerSettings, build_optimizer
from s2s_ray.training.step import Totals, TrainStep
from s2s_ray.training.steps import StepPlan, worker_batches

SHAPES = {  # d_model, encoder and decoder layers, ffn, heads, vocabulary
    "tiny": (64, 2, 2, 128, 4, 2_000),
    "debian_summarizer_en": (256, 4, 2, 1024, 4, 8_192),
    "bart-base": (768, 6, 6, 3072, 12, 50_265),
    "bart-large": (1024, 12, 12, 4096, 16, 50_265),
}
MAX_SOURCE, MAX_TARGET = 1024, 142
WARM_UP_STEPS = 4
LEAST_STEPS = 5
Run = Callable[[int], tuple[int, int, float]]  # steps to (real tokens, padded tokens, operations)
Weights = dict[str, torch.Tensor]


def make_config(name: str) -> dict[str, Any]:
    d, encoder, decoder, ffn, heads, vocabulary = SHAPES[name]
    sides = {
        f"{side}_{key}": value
        for side, layers in (("encoder", encoder), ("decoder", decoder))
        for key, value in (("layers", layers), ("ffn_dim", ffn), ("attention_heads", heads))
    }
    return {
        "model_type": "bart", "d_model": d, "vocab_size": vocabulary, "max_position_embeddings": MAX_SOURCE,
        "dropout": 0.1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, **sides,
    }  # fmt: skip


def make_rows(args: argparse.Namespace, seed: int = 0) -> Examples:
    """Sources and targets of log-normal lengths with these means; uniform tokens."""
    generator = np.random.default_rng(seed)

    def side(mean: int, spread: float, longest: int) -> Ragged:
        drawn = generator.lognormal(math.log(mean) - spread**2 / 2, spread, args.rows)
        lengths = drawn.clip(8, longest).astype(np.int64)
        return Ragged(generator.integers(4, SHAPES[args.shape][-1], int(lengths.sum())).astype(np.int32), lengths)

    return Examples(side(args.mean_source, 0.6, MAX_SOURCE), side(args.mean_target, 0.5, MAX_TARGET), 2, 1)


def operations(name: str, rows: Examples, chosen: Any) -> float:
    """Floating-point operations of one step on these rows without padding: three times those of the forward pass."""
    d, encoder, decoder, ffn, _, vocabulary = SHAPES[name]
    s, t = (side.lengths[chosen].astype(np.float64) for side in (rows.sources, rows.labels))
    encoded = encoder * (s * (4 * d * d + 2 * d * ffn) + 2 * d * s * s)
    decoded = decoder * (t * (6 * d * d + 2 * d * ffn) + s * 2 * d * d + 2 * d * (t * t / 2 + s * t))
    return float(3 * 2 * (encoded + decoded + t * vocabulary * d).sum())


class Ours:
    """`TrainStep` on token-bucketed batches, alone or as one worker of a process group."""

    def __init__(self, args: argparse.Namespace, rows: Examples, state: Weights | None, tokens: int, compiled: bool):
        self.shape, self.rows = args.shape, rows
        self.world = World.current(torch.device(args.device))
        self.backbone = backbone = BartBackbone(make_config(args.shape))
        if state is None:
            torch.manual_seed(0)
            initialise(backbone, 0.02)
        else:
            backbone.load_state_dict({name: state[backbone.checkpoint_name(name)] for name in backbone.state_dict()})
        backbone.to(self.world.device).train()
        if compiled:
            compile_layers(backbone)
        model = distribute(backbone, self.world, "ddp")
        settings = OptimizerSettings(name="adamw", learning_rate=1e-5, weight_decay=0.01)
        optimizer, _ = build_optimizer(settings, backbone, None)
        precision: Any = "bf16" if self.world.device.type == "cuda" else "fp32"
        self.step = TrainStep(model, optimizer, clip_norm=1.0, precision=precision, world_size=self.world.size)
        plan = BatchPlan(rows.sources.lengths, rows.labels.lengths, batch_tokens=tokens)
        self.steps = StepPlan(plan, self.world.size * args.accumulate, epochs=None, max_steps=1_000)
        batches = worker_batches(rows, copy.copy(self.steps), 0, self.world.rank, self.world.size)
        self.stream = on_device(batches, self.world.device)

    def __call__(self, count: int) -> tuple[int, int, float]:
        totals, flops = Totals(), 0.0
        for number in range(self.step.steps, self.step.steps + count):
            flops += sum(operations(self.shape, self.rows, chosen) for chosen in self.steps.rows(number))
            self.step(self.batches(), totals, self.steps.target_tokens(number))
        sums = self.world.sum((totals.sums["loss"].item(), totals.real_tokens, totals.padded_tokens))
        assert math.isfinite(sums[0])  # reading it waited for the device
        return int(sums[1]), int(sums[2]), flops

    def batches(self) -> list[Batch]:
        """This worker's, of the next step."""
        count = -(-len(self.steps.rows(self.step.steps)) // self.world.size)  # fewer at an epoch's end
        return [next(self.stream) for _ in range(count)]


@contextlib.contextmanager
def ours(
    args: argparse.Namespace, rows: Examples, state: Weights | None, tokens: int, *, compiled: bool = False
) -> Iterator[Ours]:
    """Made when its turn comes, and its feed stopped afterwards."""
    made = Ours(args, rows, state, tokens, compiled)
    with contextlib.closing(made.stream):
        yield made


@contextlib.contextmanager
def theirs(args: argparse.Namespace, rows: Examples, model: Any, size: int) -> Iterator[Run]:
    """transformers in the loop that its Trainer runs."""
    on_gpu = args.device == "cuda"
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=on_gpu)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(rows))
    groups = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    ordered = np.concatenate([group[np.argsort(-rows.sources.lengths[group])] for group in groups])
    batches = [ordered[i : i + size] for i in range(0, len(ordered) - size + 1, size)]
    generator.shuffle(batches)
    place = 0

    def run(steps: int) -> tuple[int, int, float]:
        nonlocal place
        real = padded = 0
        flops, loss = 0.0, torch.zeros(())
        for _ in range(steps):
            chosen = batches[place % len(batches)]
            place += 1
            batch = rows.collate(chosen, 8)
            real, padded = real + batch.real_tokens, padded + batch.padded_tokens
            flops += operations(args.shape, rows, chosen)
            batch = (batch.pin() if on_gpu else batch).to(torch.device(args.device), non_blocking=True)
            with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
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
        return real, padded, flops

    yield run


def timed(run: Run, args: argparse.Namespace) -> list[tuple[float, int, int, float]]:
    """(seconds, real, padded, operations) of `repeats` timings, each of up to `steps` steps or about `seconds`."""
    run(WARM_UP_STEPS)
    started = time.perf_counter()
    run(LEAST_STEPS)
    steps = min(args.steps, max(LEAST_STEPS, int(args.seconds / (time.perf_counter() - started) * LEAST_STEPS)))
    if torch.distributed.is_initialized():
        steps = int(World.current(torch.device(args.device)).broadcast(steps))
    timings = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        counts = run(steps)
        timings.append((time.perf_counter() - started, *counts))
    args.timed_steps = steps
    return timings


def measure(name: str, opened: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One competitor alone on the device."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    profile = None
    try:
        with opened as run:
            timings = timed(run, args)
            if args.profile and args.gpus > 1:
                from tests.benchmarks.train_profile import profile_of

                profile = profile_of(run)
    except torch.OutOfMemoryError:
        return {"name": name, "tokens_per_second": 0.0, "error": "out of memory"}
    except Exception as error:  # one competitor's failure is a result; the others still run
        return {"name": name, "tokens_per_second": 0.0, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    rates = [real / seconds for seconds, real, _, _ in timings]
    return {
        "name": name,
        "tokens_per_second": statistics.median(rates),
        "all": [round(rate) for rate in rates],
        "mfu": statistics.median(flops / seconds for seconds, _, _, flops in timings) / args.matrix_rate / args.gpus,
        "padding": 1 - sum(t[1] for t in timings) / sum(t[2] for t in timings),
        "steps": args.timed_steps,
        "milliseconds_a_step": statistics.median(t[0] for t in timings) / args.timed_steps * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
        "seconds_in_all": time.perf_counter() - started,
        **({"profile": profile} if profile else {}),
    }


def show(r: dict[str, Any]) -> None:
    """A table row, then the same as JSON."""
    if "error" in r:
        print(f"{r['name']:<34}{r['error']}")
    else:
        memory = f"{r['peak_gib']:.1f}" if r["peak_gib"] is not None else "-"
        print(
            f"{r['name']:<34}{r['tokens_per_second']:>10.0f}{r['mfu']:>8.1%}{r['padding']:>9.1%}"
            f"{r['milliseconds_a_step']:>9.0f}{memory:>7}"
        )
    print(json.dumps(r), flush=True)


def make_peer(args: argparse.Namespace) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    with torch.device(args.device):
        return BartForConditionalGeneration(BartConfig(**make_config(args.shape), attn_implementation="sdpa"))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everyone in turn, the largest batches first: they are what the figures are about."""
    started = time.perf_counter()
    args.matrix_rate = matrix_rate(torch.device(args.device), "bf16" if args.device == "cuda" else "fp32")
    print(f"matrix product: {args.matrix_rate / 1e12:.1f} TFLOP/s\n{'':<34}  tokens/s     MFU  padding  ms/step    GiB")
    rows = make_rows(args)
    peer = make_peer(args) if args.peer_rows else None
    state = None if peer is None else {name: x.detach().cpu().clone() for name, x in peer.state_dict().items()}
    mine = [(f"s2s_ray, {n} tokens", ours(args, rows, state, n)) for n in args.batch_tokens]
    mine[1:1] = [
        (f"s2s_ray, {n} tokens, compiled", ours(args, rows, state, n, compiled=True)) for n in args.compiled_tokens
    ]
    others = [(f"transformers, {n} rows", theirs(args, rows, peer, n)) for n in args.peer_rows]
    order = [entry for pair in zip(mine, others, strict=False) for entry in pair]
    order += mine[len(others) :] + others[len(mine) :]
    results = []
    for name, opened in order:
        if time.perf_counter() - started > args.limit_seconds:
            print(f"{name}: left out, the time is up")
            continue
        if peer is not None and name.startswith("s2s_ray"):
            peer.to("cpu")  # its weights are no part of our memory
        results.append(measure(name, opened, args))
        show(results[-1])
    best = {who: max((r["tokens_per_second"] for r in results if r["name"].startswith(who)), default=0.0)
            for who in ("s2s_ray", "transformers")}  # fmt: skip
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {"benchmark": "train", "shape": args.shape, "device": device, "torch": torch.__version__,
            "matrix_rate_tflops": args.matrix_rate / 1e12, "results": results,
            "best_mfu": max((r.get("mfu", 0.0) for r in results if r["name"].startswith("s2s_ray")), default=None),
            "ratio": best["s2s_ray"] / best["transformers"] if best["transformers"] else None}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bart-large")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--mean-source", type=int, default=600, help="tokens, log-normal, at most 1024")
    parser.add_argument("--mean-target", type=int, default=60, help="tokens, log-normal, at most 142")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each repeat, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each repeat, about; fewer steps where they fit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, nargs="*", help="budgets; default on CUDA 131072 196608 65536")
    parser.add_argument("--compiled-tokens", type=int, nargs="*", help="with compiled layers; default on CUDA 131072")
    parser.add_argument("--peer-rows", type=int, nargs="*", help="default on CUDA 64 128 32 16")
    parser.add_argument("--limit-seconds", type=float, default=150.0, help="nothing begins after that")
    parser.add_argument("--gpus", type=int, default=1, help="over 1: ours alone, by DDP over NCCL, beside one GPU")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a worker in a step of ours")
    parser.add_argument("--profile", action="store_true", help="with --gpus: also where the time of a step goes")
    parser.add_argument("--check", action="store_true", help="only compare losses and gradients with padded fp32 ones")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    for name, on_gpu, on_cpu in (("batch_tokens", [131_072, 196_608, 65_536], [8_192]),
                                 ("compiled_tokens", [131_072], []),
                                 ("peer_rows", [64, 128, 32, 16], [16, 32])):  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == "cuda" else on_cpu)
    if args.check:
        from tests.benchmarks.train_check import check

        summary = check(args)
    elif args.gpus > 1:
        from tests.benchmarks.train_workers import scaling

        summary = scaling(args)
    else:
        summary = compare(args)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
