"""The whole job in this process on a real local Ray with a tiny real model."""

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from checker import Verdict, check
from job_helpers import write_input

from s2s_ray.errors import ErrorRateExceededError, FingerprintError, InputError, PresetError, PresetIntegrityError
from s2s_ray.pipelines.generate import run
from s2s_ray.pipelines.publish import verify
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.storage import Location

ROWS = 120


@pytest.fixture(scope="module")
def texts(english_text: list[str]) -> list[str]:
    return [text[: 40 + 7 * (row % 17)] for row, text in enumerate(english_text[:ROWS])]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[str]:
    return write_input(tmp_path_factory.mktemp("input"), texts, files=3, group=16)


@pytest.fixture(scope="module")
def expected(texts: list[str], tiny_bart_dir: Path) -> list[str]:
    """What the task itself gives, outside the pipeline."""
    return list(Seq2SeqLM.from_preset(tiny_bart_dir).generate(texts, max_new_tokens=12))


@pytest.fixture
def settings(inputs: list[str], tiny_bart_dir: Path, tmp_path: Path, local_ray: None) -> GenerateSettings:
    return GenerateSettings(
        input=(str(Path(inputs[0]).parent),),
        output=str(tmp_path / "out"),
        preset=str(tiny_bart_dir),
        max_target_length=12,
        rows_per_unit=16,
    )


def sound(inputs: list[str], output: str) -> Verdict:
    verdict = check(inputs, output)
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    verify(Location.parse(output))
    return verdict


def test_job_then_no_op_then_other_settings(
    settings: GenerateSettings, inputs: list[str], texts: list[str], expected: list[str]
) -> None:
    report = run(settings)
    assert (report.rows, report.error_rows, report.rows_generated, report.exit_code) == (ROWS, 0, ROWS, 0)
    verdict = sound(inputs, settings.output)
    assert [verdict.summaries()[row] for row in range(ROWS)] == expected
    assert len(set(expected)) > ROWS / 10, "the model answers everything alike, so the order would not show"
    assert len(report.samples) == 3 and report.samples[0] == (texts[0], expected[0])
    assert sum(verdict.table.column("num_tokens").to_pylist()) == report.tokens_generated

    before = (Path(settings.output) / "_manifest.json").stat().st_mtime_ns
    for _ in range(5):  # P22
        again = run(dataclasses.replace(settings, num_replicas="2", max_batch_tokens=999))
        assert (again.rows, again.rows_generated, again.exit_code) == (ROWS, 0, 0)
    assert (Path(settings.output) / "_manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FingerprintError, match="num_beams was None, now 3"):
        run(dataclasses.replace(settings, num_beams=3))
    sound(inputs, settings.output)


def test_resume_does_only_what_is_missing(settings: GenerateSettings, inputs: list[str]) -> None:
    whole = dataclasses.replace(settings, publish="none")
    first = run(whole)
    output = Path(settings.output)
    units = len(json.loads((output / "_manifest.json").read_text())["parts"])
    assert first.rows_generated == ROWS and units == 9 and verify(Location.parse(output))["publish"] == "none"
    for name in ("_SUCCESS", "_manifest.json"):
        (output / name).unlink()
    records = sorted(output.glob("_s2s/*/commit/u*.json"))
    gone = [json.loads(path.read_text()) for path in records[3:5]]
    for path in records[3:5]:
        path.unlink()
    again = run(dataclasses.replace(settings, publish="copy"))
    assert again.rows_generated == sum(record["rows"] for record in gone)
    sound(inputs, settings.output)
    assert not list(output.glob("_s2s/*/data/*"))


def test_samples_depend_on_seed_and_row_alone(settings: GenerateSettings, inputs: list[str], tmp_path: Path) -> None:
    sampled = dataclasses.replace(settings, sampler="random", seed=7, score=True, columns=("id", "text"))
    other_shape = {"rows_per_unit": 50, "num_replicas": "2", "max_batch_tokens": 400, "output": str(tmp_path / "other")}
    one, two = run(sampled), run(dataclasses.replace(sampled, **other_shape))
    first, second = sound(inputs, one.output), sound(inputs, two.output)
    assert first.summaries() == second.summaries()
    assert len(set(first.summaries().values())) > ROWS / 2
    scores = zip(first.table.column("score").to_pylist(), second.table.column("score").to_pylist(), strict=True)
    assert all(a == pytest.approx(b, abs=1e-3) and a < 0 for a, b in scores)
    assert first.table.schema.names == ["id", "text", "summary", "num_tokens", "finish_reason", "truncated", "score"]


def test_bad_rows_leave_their_neighbours_unchanged(
    settings: GenerateSettings, texts: list[str], expected: list[str], tmp_path: Path
) -> None:
    column = [text.encode() for text in texts]
    bad: dict[int, bytes | None] = {3: None, 40: b"\xff\xfe", 41: b"\xed\xa0\x80", 77: b"y" * (2**20 + 1)}
    long, empty = 50, 60
    for row, content in {**bad, long: b"many words " * 300, empty: b""}.items():
        column[row] = content  # type: ignore[assignment]
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"id": range(ROWS), "text": pa.array(column, pa.binary())}), path, row_group_size=32)
    report = run(dataclasses.replace(settings, input=(str(path),)))
    assert report.exit_code == 3 and report.reasons == {"NULL_TEXT": 1, "INVALID_UTF8": 2, "TOO_LONG": 1}
    verdict = sound([str(path)], report.output)
    assert verdict.errors.column("row").to_pylist() == sorted(bad)
    summaries = verdict.summaries()
    assert {row for row in summaries if summaries[row] != expected[row]} <= {long, empty}
    rows = {row["id"]: row for row in verdict.table.to_pylist()}
    assert rows[long]["truncated"] and not rows[0]["truncated"]
    assert (rows[empty]["summary"], rows[empty]["finish_reason"], rows[empty]["num_tokens"]) == ("", "empty", 0)


def test_too_many_errors_publish_nothing_and_keep_what_is_done(
    settings: GenerateSettings, texts: list[str], tmp_path: Path
) -> None:
    path = write_input(tmp_path / "in", [text if row % 3 else None for row, text in enumerate(texts)])
    strict = dataclasses.replace(settings, input=tuple(path))
    with pytest.raises(ErrorRateExceededError, match=r"at most 0.1 of the rows may fail .*--max-error-rate"):
        run(strict)
    assert not [name for name in Location.parse(settings.output).list_names() if name != "_s2s"]
    report = run(dataclasses.replace(strict, max_error_rate=0.4))
    assert (report.rows, report.error_rows, report.exit_code) == (80, 40, 3)
    assert report.rows_generated < ROWS
    sound(path, settings.output)


def test_input_without_rows(settings: GenerateSettings, tmp_path: Path) -> None:
    path = write_input(tmp_path / "in", [])
    report = run(dataclasses.replace(settings, input=tuple(path)))
    assert (report.rows, report.error_rows, report.exit_code) == (0, 0, 0)
    verdict = sound(path, settings.output)
    assert verdict.table.schema.names[-4:] == ["summary", "num_tokens", "finish_reason", "truncated"]


def test_on_s3(
    settings: GenerateSettings, inputs: list[str], tiny_bart_dir: Path, s3_server: str, tmp_path: Path
) -> None:
    """Input, preset and output on an object store."""
    root = Location.parse(s3_server) / f"job-{uuid.uuid4().hex[:8]}"
    for path in inputs:
        (root / "in" / Path(path).name).upload(Path(path))
    for path in tiny_bart_dir.iterdir():
        (root / "preset" / path.name).upload(path)
    urls = {"input": ((root / "in").url,), "preset": (root / "preset").url, "output": (root / "out").url}
    report = run(dataclasses.replace(settings, **urls))
    assert (report.rows, report.rows_generated, report.exit_code) == (ROWS, ROWS, 0)
    filesystem, bucket = root.filesystem_for_arrow()
    assert isinstance(filesystem, pafs.FileSystem)
    names = [f"{bucket}/in/{Path(path).name}" for path in inputs]
    verdict = check(names, f"{bucket}/out", filesystem)
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    verify(root / "out")
    assert run(dataclasses.replace(settings, **urls)).rows_generated == 0


def test_dry_run_writes_nothing(settings: GenerateSettings) -> None:
    report = run(dataclasses.replace(settings, dry_run=True))
    assert "120 rows in 3 files, 9 units" in str(report) and "nothing was written" in str(report)
    assert not Path(settings.output).exists()


def test_refused_before_anything_is_written(settings: GenerateSettings, tmp_path: Path, tiny_bart_dir: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"text_column": "body"}, InputError, "'body'"),
        ({"input": (str(tmp_path / "nothing"),)}, InputError, "Nothing was found"),
        ({"preset": "no_such_preset"}, PresetError, "no_such_preset"),
        ({"summary_column": "id"}, InputError, "clash"),
        ({"max_source_length": 2}, Exception, "max_length must be more than"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            run(dataclasses.replace(settings, **changes))
    assert not Path(settings.output).exists()
    Path(settings.output).mkdir()
    (Path(settings.output) / "thesis.docx").write_text("do not lose me")
    with pytest.raises(InputError, match=r"must be new, empty, or an earlier run's. .* holds thesis.docx"):
        run(settings)


def test_a_preset_that_changes_is_refused_on_the_node(settings: GenerateSettings, tiny_bart_dir: Path) -> None:
    from s2s_ray import presets
    from s2s_ray.pipelines.replica import Replica
    from s2s_ray.pipelines.rows import Job

    job = Job(settings, "0" * 64, "f" * 32, pa.schema([]), "run")
    assert presets.resolve(tiny_bart_dir).digest != job.preset_digest
    with pytest.raises(PresetIntegrityError):
        Replica(job, 1)
