"""How much of the processors the other guests of a shared machine took: turns where it is much are not to be quoted."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of a turn, and which share of the processor time that was asked for in it others got."""

    seconds: float
    stolen: float

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s" + (
            f" ({self.stolen:.0%} of the processors stolen)" if self.stolen > 0.02 else ""
        )


def timed(run: Callable[[], object]) -> Timed:
    """Run it. On a machine that does not tell, nothing is stolen."""
    before, start = _ticks(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    stolen, asked = (after - at for after, at in zip(_ticks(), before, strict=True))
    return Timed(seconds, stolen / max(1, asked))


def _ticks() -> tuple[int, int]:
    """(stolen, asked for), of all processors since the machine's start."""
    with suppress(OSError, ValueError):
        user, nice, system, _, _, irq, softirq, stolen, *_ = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        )
        return stolen, user + nice + system + irq + softirq + stolen
    return 0, 0
