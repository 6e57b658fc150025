"""Where the time of a step of several workers goes: products, exchange of gradients, data, host."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from s2s_ray.training.step import Totals
from tests.benchmarks.train import Ours

STEPS = 10
BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's
MILLISECONDS = ("data", "forward_backward", "optimizer", "host")


def profile_of(ours: Ours) -> dict[str, Any]:
    """Medians of a step in milliseconds for each worker, with and without exchange of gradients, and what a bare
    all-reduce of as many bytes takes. Prints them at rank 0; all workers must ask together.

    `host` is how long the worker's thread took to hand the step to the device: where it is as long as the rest, the
    device waits for the host. Without exchange the workers' weights part: nothing may be trained afterwards.
    """
    device, world = ours.world.device, ours.world
    with_exchange = step_times(ours, contextlib.nullcontext)
    alone = step_times(ours, ours.step.model.no_sync)
    sizes = [p.numel() * p.element_size() for p in ours.backbone.parameters() if p.requires_grad]
    everyone = world.gather({"exchange": with_exchange, "alone": alone})
    found: dict[str, Any] = {
        "gigabytes": sum(sizes) / 1e9,
        "all_reduce": {
            name: bare(sum(sizes), device, size) for name, size in (("one", None), ("25 MiB", BUCKET_BYTES))
        },
        "steps": everyone,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        others = [index for index in range(torch.cuda.device_count()) if index != device.index]
        found["peer_access"] = [torch.cuda.can_device_access_peer(torch.cuda.current_device(), i) for i in others[:1]]
        found["allocation_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    if world.rank == 0:
        show(found)
    return found


def step_times(ours: Ours, context: Callable[[], Any]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in (*MILLISECONDS, "real_tokens")}
    marks: dict[str, float] = {}

    def before_optimizer(*_: Any) -> None:
        marks["host"] = time.perf_counter()
        marks["backward"] = now(ours.world.device)

    hook = ours.step.optimizer.register_step_pre_hook(before_optimizer)
    for number in range(ours.step.steps, ours.step.steps + STEPS):
        divisor = ours.steps.target_tokens(number)
        begun = now(ours.world.device)
        batches = ours.batches()
        fed = time.perf_counter()
        with context():
            ours.step(batches, Totals(), divisor)
        ended = now(ours.world.device)
        for name, seconds in zip(
            MILLISECONDS,
            (fed - begun, marks["backward"] - fed, ended - marks["backward"], marks["host"] - fed),
            strict=True,
        ):
            times[name].append(seconds * 1e3)
        times["real_tokens"].append(sum(batch.real_tokens for batch in batches))
    hook.remove()
    return {name: statistics.median(values) for name, values in times.items()}


def bare(size: int, device: torch.device, bucket: int | None) -> dict[str, float]:
    """All-reduce of `size` bytes of fp32, in one or in buckets on the way together; bus bandwidth as NCCL counts it."""
    parts = torch.zeros(size // 4, device=device).split((bucket or size) // 4)
    seconds = []
    for _ in range(6):
        begun = now(device)
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            work.wait()
        seconds.append(now(device) - begun)
    median, count = statistics.median(seconds[1:]), dist.get_world_size()
    return {"milliseconds": median * 1e3, "bus_gigabytes_per_second": size / median / 1e9 * 2 * (count - 1) / count}


def now(device: torch.device) -> float:
    """The time, once the device has done all it was handed."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def show(found: dict[str, Any]) -> None:
    print(f"{found['gigabytes']:.2f} GB of gradients; {found['threads']} threads a worker", end="")
    print("".join(f"; {name} {found[name]}" for name in ("peer_access", "allocation_retries") if name in found))
    for name, result in found["all_reduce"].items():
        print(
            f"bare all-reduce, {name:<8}{result['milliseconds']:>9.1f} ms"
            f"{result['bus_gigabytes_per_second']:>9.1f} GB/s on the bus"
        )
    print(f"{'ms a step (median)':<28}" + "".join(f"{name:>18}" for name in (*MILLISECONDS, "real_tokens")))
    for rank, worker in enumerate(found["steps"]):
        for name, times in worker.items():
            values = "".join(f"{times[key]:>18.1f}" for key in (*MILLISECONDS, "real_tokens"))
            print(f"worker {rank}, {name:<18}{values}")
