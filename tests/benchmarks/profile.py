"""Where the time of one run goes: by group of kernels on a GPU, by function on the host."""

import cProfile
import io
import pstats
import re
from collections import Counter
from collections.abc import Callable

import torch

# The first that matches a kernel's name is its group.
_GROUPS = {
    "decoder attention": r"^_decode$",
    "encoder attention": r"^_ragged$|flash|fmha",
    "keys and values stored": r"^_scatter$",
    "norms": r"norm",
    "choice of tokens": r"^_maxima$|^_pick$|topk|sort|argmax",
    "products": r"gemm|cutlass|nvjet|splitK|cublas|sgemm|_matmul",
    "copies between host and device": r"Memcpy|Memset",
}
_OTHERS = "element by element, gathers and the rest"


def print_profile(run: Callable[[], object], device: str, lines: int = 25) -> None:
    """Runs once for the kernels (CUDA) and once for the host's functions; prints both tables."""
    if device == "cuda":
        _print_kernels(run)
    profile = cProfile.Profile()
    profile.runcall(run)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(lines)
    print(text.getvalue())


def _print_kernels(run: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    names: dict[str, Counter[str]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            group = next((g for g, pattern in _GROUPS.items() if re.search(pattern, event.name)), _OTHERS)
            times[group] += event.device_time
            names.setdefault(group, Counter())[event.name] += event.device_time
    total = times.total()
    print(f"kernels: {total / 1e6:.3f} s")
    for group, microseconds in times.most_common():
        print(f"{group:40}{microseconds / 1e3:10.1f} ms{microseconds / total:8.1%}")
        for name, part in names[group].most_common(4):
            print(f"    {name[:90]:90}{part / 1e3:10.1f} ms")
