"""The evaluation job: generate for every row of Parquet data, then compare the texts with a column of references.

OUT/answers/           what jobs/generate.py writes, the references beside the texts
OUT/evaluation.json    the figures, each with its interval and the signature that says how it was computed
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from s2s_ray.errors import InputError
from s2s_ray.pipelines import flags, generate
from s2s_ray.pipelines.flags import require, setting
from s2s_ray.pipelines.generate import prepare
from s2s_ray.pipelines.ledger import MANIFEST
from s2s_ray.pipelines.report import RunReport
from s2s_ray.pipelines.settings import FIELDS, GenerateSettings
from s2s_ray.storage import Location, canonical_json, strict_json

EVALUATION_FILE = "evaluation.json"
METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(GenerateSettings):
    """All settings of an evaluation: those of a generate job, and what to compare with."""

    reference_column: str = setting("reference", "input column with the text that the model should have written")
    metrics: tuple[str, ...] = setting(("rouge1", "rouge2", "rougeL"), f"of {', '.join(METRICS)}", tuple)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.metrics if name not in METRICS]
        require(bool(self.metrics) and not unknown, "metrics", f"of {', '.join(METRICS)}", unknown or self.metrics)
        kept = self.columns is None or self.reference_column in self.columns
        require(kept, "columns", f"with {self.reference_column!r} among them", self.columns)
        ours = self.reference_column == self.summary_column
        require(not ours, "reference_column", "another column than --summary-column", self.reference_column)

    def generation(self) -> GenerateSettings:
        """The settings of the generate job."""
        values = {name: getattr(self, name) for name in FIELDS}
        return GenerateSettings(**values | {"output": (Location.parse(self.output) / "answers").url})


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The outcome: the generate job's report, and the figures as evaluation.json holds them."""

    answers: RunReport
    path: str
    figures: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        return self.answers.exit_code

    def __str__(self) -> str:
        if not self.figures:
            return str(self.answers)
        rows, without = self.figures["rows"], self.figures["without_reference"]
        lines = [str(self.answers), f"scored    {rows} rows, {without} without a reference left out: {self.path}"]
        for name, score in self.figures["scores"].items():
            interval = f"[{score['low']:.4f}, {score['high']:.4f}]"
            lines.append(f"{name:<10}{score['value']:.4f} {interval}  {score['signature']}")
        return "\n".join(lines)


def run(settings: EvaluateSettings) -> Evaluation:
    """Generate what is not there yet, then score it. Raises an S2SRayError whose exit code is the job's."""
    from s2s_ray import metrics

    generation = settings.generation()
    _check_reference(prepare(generation).plan.schema, settings)
    report = generate.run(generation)
    target = Location.parse(settings.output) / EVALUATION_FILE
    if settings.dry_run:
        return Evaluation(report, target.url, {})
    manifest = strict_json((Location.parse(report.output) / MANIFEST).read_bytes(), MANIFEST)
    texts, references, without = _pairs(Location.parse(report.output), manifest, settings)
    if not texts:
        raise InputError(f"no row has both an answer and text in {settings.reference_column!r}; there is none to score")
    scores = metrics.corpus_scores(settings.metrics, texts, references)
    figures = {
        "rows": len(texts),
        "without_reference": without,
        "error_rows": report.error_rows,
        "fingerprint": manifest["fingerprint"],
        "scores": {
            name: {"value": score.value, "low": score.low, "high": score.high, "confidence": score.confidence,
                   "signature": score.signature}
            for name, score in scores.items()
        },
    }  # fmt: skip
    target.write_atomic(canonical_json(figures))
    return Evaluation(report, target.url, figures)


def _check_reference(schema: Any, settings: EvaluateSettings) -> None:
    import pyarrow as pa

    name = settings.reference_column
    kind = schema.field(name).type if name in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(
            f"--reference-column must name one text column of every file of --input. Received: {name!r}"
            + (f" of type {kind}" if kind is not None else f"; there are {', '.join(schema.names)}")
        )


def _pairs(
    output: Location, manifest: Mapping[str, Any], settings: EvaluateSettings
) -> tuple[list[str], list[str], int]:
    """Generated texts, their references, and how many rows have none (null or blank)."""
    texts: list[str] = []
    references: list[str] = []
    without = 0
    for part in manifest["parts"]:
        with (output / part["data"]["path"]).open() as stream, pq.ParquetFile(stream) as parquet:
            for batch in parquet.iter_batches(columns=[settings.summary_column, settings.reference_column]):
                for text, reference in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    if reference is None or not reference.strip():
                        without += 1
                    else:
                        texts.append(text)
                        references.append(reference)
    return texts, references, without


def parse(argv: Sequence[str], description: str, defaults: Mapping[str, Any]) -> EvaluateSettings:
    """Settings from flags, over those of --config, over `defaults`. Raises SettingsError; argparse SystemExit(2)."""
    return flags.parse(EvaluateSettings, argv, description, defaults)
