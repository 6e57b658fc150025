"""The evaluation job on a real local Ray: its figures are those of the metrics on the texts it wrote."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s2s_ray import metrics
from s2s_ray.errors import InputError, SettingsError
from s2s_ray.pipelines.evaluate import EvaluateSettings, parse, run


@pytest.fixture
def settings(english_text: list[str], tiny_bart_dir: Path, tmp_path: Path) -> EvaluateSettings:
    texts: list[str | None] = [*english_text[:12], None]
    references: list[str | None] = [" ".join(text.split()[:6]) for text in english_text[:12]]
    references[3:5] = [None, "  "]
    table = pa.table({"text": texts, "reference": [*references, "of an error row"], "number": range(13)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=4)
    return EvaluateSettings(
        input=(str(tmp_path / "in.parquet"),),
        output=str(tmp_path / "out"),
        preset=str(tiny_bart_dir),
        max_target_length=12,
        metrics=("rougeL", "chrf"),
    )


def test_figures_are_those_of_the_written_texts(settings: EvaluateSettings, local_ray: None) -> None:
    evaluation = run(settings)
    saved = json.loads((Path(settings.output) / "evaluation.json").read_text())
    assert (saved["rows"], saved["without_reference"], saved["error_rows"]) == (10, 2, 1) and evaluation.exit_code == 3
    files = sorted((Path(settings.output) / "answers").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    pairs = [(row["summary"], row["reference"]) for row in rows if (row["reference"] or " ").strip()]
    texts, references = (list(column) for column in zip(*pairs, strict=True))
    expected = metrics.corpus_scores(("rougeL", "chrf"), texts, references)
    assert saved["scores"]["rougeL"] == {**dataclasses.asdict(expected["rougeL"])}
    assert saved["scores"]["chrf"]["signature"] == expected["chrf"].signature and "version:" in str(evaluation)
    again = run(dataclasses.replace(settings, metrics=("bleu",)))  # generates nothing anew
    assert again.answers.rows_generated == 0 and set(again.figures["scores"]) == {"bleu"}


def test_what_cannot_be_scored_is_refused_before_generating(settings: EvaluateSettings, tmp_path: Path) -> None:
    for column, message in (("none", "there are text, reference, number, summary"), ("number", "of type int64")):
        with pytest.raises(InputError, match=message):
            run(dataclasses.replace(settings, reference_column=column))
    assert not (tmp_path / "out").exists()
    for changes, message in (
        ({"metrics": ("meteor",)}, "--metrics must be of rouge1"),
        ({"columns": ("text",)}, "--columns must be with 'reference' among them"),
        ({"reference_column": "summary"}, "another column than --summary-column"),
    ):
        with pytest.raises(SettingsError, match=message):
            dataclasses.replace(settings, **changes)
    flags = ["--input", "a", "--output", "b", "--preset", "c", "--metrics", "bleu", "--num-beams", "2"]
    assert parse(flags, "", {}).generation().num_beams == 2
