"""Progress as a bar on a terminal, and as one line every few seconds in a log."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 5.0


class Progress:
    """Counts what commits. `done_before` rows were committed by an earlier run and say nothing about the rate."""

    def __init__(self, total_rows: int, done_before: int, stream: TextIO | None = None) -> None:
        self.total_rows = total_rows
        self.done = done_before
        self.rows = self.errors = self.tokens = 0
        self._stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm[None] | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total_rows, initial=done_before, unit="row", file=self._stream, dynamic_ncols=True)

    def update(self, rows: int, errors: int, tokens: int) -> None:
        """One unit more: its rows (error rows among them), error rows and generated tokens."""
        self.done += rows
        self.rows += rows
        self.errors += errors
        self.tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tokens/s, {self.errors} errors", refresh=False)
            self._bar.update(rows)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    @property
    def seconds(self) -> float:
        """Since this run began, at least a millisecond."""
        return max(1e-3, time.monotonic() - self._started)

    def line(self) -> str:
        """rows, rate, errors and time to go, on one line."""
        rate = self.rows / self.seconds
        left = (self.total_rows - self.done) / rate if rate else float("inf")
        return (
            f"{self.done}/{self.total_rows} rows ({self.done / max(1, self.total_rows):.0%}), {rate:.1f} rows/s, "
            f"{self.tokens / self.seconds:.0f} tokens/s, {self.errors} errors, {duration(left)} left"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Such as 42 s, 3 min 05 s or 2 h 07 min."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
