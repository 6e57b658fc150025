"""What a fine-tuning run says while it trains and at its end."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from s2s_ray.pipelines.progress import duration
from s2s_ray.storage import Location


class TrainingProgress:
    """One line per event of the training loop."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._first = self._steps = 0

    def show(self, event: Mapping[str, Any]) -> None:
        """Print an event of training/loop.py."""
        if event["kind"] == "start":
            self._started, self._first, self._steps = time.monotonic(), event["step"], event["steps"]
        line = self._line(event)
        print(line, file=self._stream, flush=True)

    def _line(self, event: Mapping[str, Any]) -> str:
        step = event["step"]
        if event["kind"] == "start":
            workers = len(event["pids"])
            return f"{workers} {'worker' if workers == 1 else 'workers'}, step {step} of {event['steps']}"
        if event["kind"] == "checkpoint":
            return f"step {step}: checkpoint written"
        if event["kind"] == "evaluation":
            return f"step {step}: {figures(event)}"
        left = (self._steps - step) * (time.monotonic() - self._started) / max(1, step - self._first)
        return (
            f"step {step}/{self._steps}  loss {event['loss']:.4f}  lr {event['learning_rate']:.3g}  "
            f"{event['tokens_per_second']:.0f} tokens/s  MFU {event['mfu']:.1%}  "
            f"padding {event['padding_share']:.1%}  {duration(left)} left"
        )


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """The outcome of a run; `plan` is of a dry run, which has nothing else."""

    output: str
    steps: int = 0
    preset_step: int = 0
    loss: float = float("nan")
    padding_share: float = 0.0
    evaluation: Mapping[str, Any] | None = None
    skipped: Mapping[str, int] | None = None
    truncated: tuple[int, int] = (0, 0)
    pairs: int = 0
    published: str | None = None
    plan: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.plan:
            return "\n".join(self.plan)
        bad = ", ".join(f"{count} {reason}" for reason, count in sorted((self.skipped or {}).items())) or "none"
        lines = [
            f"data      {self.pairs} pairs; unusable: {bad}; cut: {self.truncated[0]} sources, {self.truncated[1]} "
            f"targets; padding {self.padding_share:.1%}",
            f"steps     {self.steps}, the last loss {self.loss:.4f}",
            f"preset    {self.output}/preset (of step {self.preset_step})",
        ]
        if self.evaluation is not None:
            lines.append(f"figures   {figures(self.evaluation)}")
            lines += [f"          {signature}" for signature in self.evaluation.get("signatures", {}).values()]
        if self.published is not None:
            lines.append(f"published {self.published}")
        return "\n".join(lines)


def make_report(output: Location, report: Mapping[str, Any], published: str | None) -> FinetuneReport:
    """The report on a finished run from what its report.json holds."""
    log, data = report["log"], report["data"]["train"]
    step = report["preset_step"]
    return FinetuneReport(
        output=output.url,
        steps=report["steps"],
        preset_step=step,
        loss=log[-1]["loss"],
        padding_share=sum(entry["padding_share"] for entry in log) / len(log),
        evaluation=next((entry for entry in report["evaluations"] if entry["step"] == step), None),
        skipped=data["skipped"],
        truncated=(data["truncated"][0], data["truncated"][1]),
        pairs=sum(data["inputs"]),
        published=published,
    )


def figures(evaluation: Mapping[str, Any]) -> str:
    """An evaluation's figures in words."""
    return "  ".join(f"{name} {value:.4f}" for name, value in evaluation.items() if isinstance(value, float))
