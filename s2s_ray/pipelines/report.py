"""What a run says at its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from s2s_ray.errors import EXIT_DONE_WITH_ERROR_ROWS, EXIT_OK
from s2s_ray.pipelines.ledger import MANIFEST
from s2s_ray.pipelines.progress import duration
from s2s_ray.pipelines.publish import ERRORS
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location

SAMPLES = 3
SAMPLE_CHARACTERS = 240


@dataclass(frozen=True, slots=True)
class RunReport:
    """The outcome of a run. `rows_generated` and `seconds` are of this run alone; rows and errors are of the output."""

    output: str
    rows: int
    error_rows: int
    reasons: Mapping[str, int]
    rows_generated: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    samples: tuple[tuple[str, str], ...] = ()
    plan: tuple[str, ...] = ()  # of a dry run, which has nothing else

    @property
    def exit_code(self) -> int:
        return EXIT_DONE_WITH_ERROR_ROWS if self.error_rows else EXIT_OK

    def __str__(self) -> str:
        if self.plan:
            return "\n".join(self.plan)
        lines: list[str] = []
        for source, summary in self.samples:
            lines += ["", f"  {_short(source)}", f"  -> {_short(summary)}"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items()))
        lines += [
            "",
            f"output    {self.output} ({self.rows} rows)",
            f"errors    {self.output}/{ERRORS} ({self.error_rows} rows{': ' + reasons if reasons else ''})",
            f"manifest  {self.output}/{MANIFEST}",
            self._rate(),
        ]
        return "\n".join(lines)

    def _rate(self) -> str:
        if not self.rows_generated:
            return "rate      complete already: 0 rows generated"
        rows, tokens = self.rows_generated / self.seconds, self.tokens_generated / self.seconds
        took = duration(self.seconds)
        return f"rate      {self.rows_generated} rows in {took}: {rows:.1f} rows/s, {tokens:.0f} tokens/s"


def make_report(
    output: Location, settings: GenerateSettings, manifest: Mapping[str, Any], **of_this_run: Any
) -> RunReport:
    """The report on a published output, with its first rows as samples."""
    return RunReport(
        output=output.url,
        rows=manifest["rows"],
        error_rows=manifest["error_rows"],
        reasons=manifest["reasons"],
        samples=_samples(output, settings, manifest),
        **of_this_run,
    )


def _samples(output: Location, settings: GenerateSettings, manifest: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    part = next((part for part in manifest["parts"] if part["rows"]), None)
    if part is None:
        return ()
    with (output / part["data"]["path"]).open() as stream, pq.ParquetFile(stream) as parquet:
        kept = settings.text_column in parquet.schema_arrow.names
        columns = [settings.summary_column, *([settings.text_column] if kept else [])]
        batch = next(parquet.iter_batches(SAMPLES, columns=columns, use_threads=False))
    rows = batch.to_pylist()
    return tuple((_text(row.get(settings.text_column, "")), row[settings.summary_column]) for row in rows)


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[: SAMPLE_CHARACTERS - 3]}..."
