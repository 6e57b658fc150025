"""Progress of `fit`: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from tqdm import tqdm

Verbose = Literal["auto", 0, 1, 2]
SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """One epoch's display. verbose: 0 nothing, 1 or "auto" bar or lines, 2 the epoch's last line only."""

    def __init__(
        self, verbose: Verbose, epoch: int, epochs: int, steps: int | None, stream: TextIO | None = None
    ) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.verbose = verbose
        self.title = f"epoch {epoch + 1}/{epochs}"
        self.steps = steps
        self.done = 0
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        show_bar = verbose in ("auto", 1) and self.stream.isatty()
        self._bar: Any = tqdm(total=steps, desc=self.title, unit="step", file=self.stream) if show_bar else None

    def advance(self, read: Callable[[], Mapping[str, float]]) -> None:
        """One step is done; `read` gives the figures so far and is only called when something is shown."""
        self.done += 1
        due = time.monotonic() >= self._next_line
        if due:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        if self._bar is not None:
            if due or self.done == 1:
                self._bar.set_postfix_str(_format(read()), refresh=False)
            self._bar.update()
        elif due and self.verbose in ("auto", 1):
            self._line(f"step {self.done}/{self.steps or '?'}  {_format(read())}")

    def close(self, logs: Mapping[str, float]) -> None:
        """The epoch is over: its final figures."""
        if self._bar is not None:
            self._bar.set_postfix_str(_format(logs), refresh=False)
            self._bar.close()
        elif self.verbose != 0:
            self._line(_format(logs))

    def _line(self, text: str) -> None:
        print(f"{self.title}  {text}", file=self.stream, flush=True)


def _format(logs: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in logs.items())
