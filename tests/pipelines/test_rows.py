"""Reading, tokenising and writing a unit: bad rows are told apart, their neighbours do not change. No Ray, no model."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_helpers import echo, prepare, process

from s2s_ray.errors import InfrastructureError, InputError
from s2s_ray.pipelines.rows import ANSWER_SCHEMA, read_unit

GOOD = [f"the good row number {row}" for row in range(8)]
BAD: list[tuple[bytes | None, str]] = [
    (None, "NULL_TEXT"),
    (b"caf\xe9 in Latin-1", "INVALID_UTF8"),
    (b"a lone \xed\xa0\x80 surrogate", "INVALID_UTF8"),
    (b"\xff\xfe\x00", "INVALID_UTF8"),
    (b"x" * (2**20 + 1), "TOO_LONG"),
]


@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("position", [0, 4, 8])
def test_bad_rows_and_their_neighbours(tiny_bart_dir: Path, tmp_path: Path, position: int, kind: pa.DataType) -> None:
    texts = [text.encode() for text in GOOD]
    rows: list[bytes | None] = [*texts[:position], *(bad for bad, _ in BAD), *texts[position:]]
    offsets_ok = pa.array(rows, pa.large_binary() if kind == pa.large_string() else pa.binary())
    column = offsets_ok.view(kind)  # as a writer that does not check UTF-8 leaves it
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": column, "id": range(len(rows))}), tmp_path)
    data, errors = process(job, unit)
    assert data.column("summary").to_pylist() == GOOD
    assert data.column("id").to_pylist() == [i for i in range(len(rows)) if not position <= i < position + len(BAD)]
    assert errors.column("reason").to_pylist() == [reason for _, reason in BAD]
    assert errors.column("row").to_pylist() == list(range(position, position + len(BAD)))
    assert errors.column("source_row").to_pylist() == errors.column("row").to_pylist()
    assert set(errors.column("attempts").to_pylist()) == {2}
    digests = errors.column("input_sha256").to_pylist()
    assert digests[0] is None and all(len(digest) == 64 for digest in digests[1:])
    content = b"".join(str(value).encode() for value in errors.column("message").to_pylist())
    assert b"Latin-1" not in content and b"surrogate" not in content.replace(b"surrogates", b"")


def test_odd_but_good_text(tiny_bart_dir: Path, tmp_path: Path) -> None:
    texts = ["emoji 🎉🏳️‍🌈 and 漢字", "nul \0 inside", "<s>special</s> <mask>", "\u202eright to left", "a" * 300]
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": texts}), tmp_path)
    data, errors = process(job, unit)
    assert (data.num_rows, errors.num_rows) == (5, 0)
    assert data.column("summary").to_pylist()[0] == texts[0] and data.column("text").to_pylist() == texts


def test_empty_and_blank_text_need_no_model(tiny_bart_dir: Path, tmp_path: Path) -> None:
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": ["", " \n\t ", "good"]}), tmp_path, score=True)
    work, _ = read_unit(unit, job)
    assert [ids is None for ids in work.column("token_ids").to_pylist()] == [True, True, False]
    data, errors = process(job, unit)
    assert errors.num_rows == 0 and data.column("summary").to_pylist() == ["", "", "good"]
    assert data.column("finish_reason").to_pylist() == ["empty", "empty", "stop"]
    assert data.column("num_tokens").to_pylist()[:2] == [0, 0]
    assert data.column("score").to_pylist() == [None, None, -1.0]


@pytest.mark.parametrize("on_long", ["truncate", "error"])
def test_long_rows_are_marked_or_refused(tiny_bart_dir: Path, tmp_path: Path, on_long: str) -> None:
    table = pa.table({"text": ["short", "long " * 400, "short too"]})
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, on_long=on_long, max_source_length=16)
    data, errors = process(job, unit)
    if on_long == "truncate":
        assert data.column("truncated").to_pylist() == [False, True, False] and errors.num_rows == 0
        assert len(read_unit(unit, job)[0].column("token_ids").to_pylist()[1]) == 16
    else:
        assert data.column("summary").to_pylist() == ["short", "short too"]
        assert errors.column("reason").to_pylist() == ["TOO_LONG"]
        assert "--max-source-length is 16" in errors.column("message").to_pylist()[0]


def test_every_type_is_carried(tiny_bart_dir: Path, tmp_path: Path) -> None:
    import datetime
    import decimal

    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "text": pa.array(["a", None, "c"]).dictionary_encode(),
            "i8": pa.array([1, 2, None], pa.int8()),
            "u64": pa.array([2**64 - 1, 0, 1], pa.uint64()),
            "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-9.99")], pa.decimal128(5, 2)),
            "when": pa.array([moment, None, moment], pa.timestamp("us", tz="Europe/Berlin")),
            "day": pa.array([datetime.date(2026, 1, 2)] * 3, pa.date32()),
            "nested": pa.array([{"a": [1, None]}, None, {"a": []}], pa.struct([("a", pa.list_(pa.int16()))])),
            "map": pa.array([[("k", 1.5)], [], None], pa.map_(pa.string(), pa.float32())),
            "raw": pa.array([b"\xff\x00", None, b""], pa.large_binary()),
            "half": pa.array([1.5, None, float("inf")], pa.float16()),
        }
    )
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path)
    data, errors = process(job, unit)
    assert errors.num_rows == 1 and data.select(table.schema.names).equals(table.take([0, 2]))
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, columns=("raw", "i8"))
    assert process(job, unit)[0].schema.names[:3] == ["raw", "i8", "summary"]
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, columns=(), summary_column="reason")
    assert process(job, unit)[0].column("reason").to_pylist() == ["a", "c"]


def test_a_bad_row_group_is_unreadable_and_the_others_are_read(tiny_bart_dir: Path, tmp_path: Path) -> None:
    table = pa.table({"text": [f"{text} {'filler ' * 40}" for text in GOOD], "id": range(8)})
    job, (unit,) = prepare(tiny_bart_dir, table, tmp_path, group=2)
    path = tmp_path / "in.parquet"
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    data, errors = process(job, unit)
    assert data.column("id").to_pylist() == [0, 1, 4, 5, 6, 7]
    assert errors.column("row").to_pylist() == [2, 3]
    assert errors.column("reason").to_pylist() == ["UNREADABLE"] * 2 and all(errors.column("message").to_pylist())


def test_an_input_that_changes_under_the_run_stops_it(tiny_bart_dir: Path, tmp_path: Path) -> None:
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": GOOD}), tmp_path)
    path = tmp_path / "in.parquet"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="must not change during a run"):
        read_unit(unit, job)
    path.unlink()
    with pytest.raises(InfrastructureError, match="cannot be opened any more"):
        read_unit(unit, job)


def test_answers_with_errors(tiny_bart_dir: Path, tmp_path: Path) -> None:
    job, (unit,) = prepare(tiny_bart_dir, pa.table({"text": ["a", "b", None]}), tmp_path)
    work, _ = read_unit(unit, job)
    answers = echo(work).to_pylist()
    answers[0] = {"reason": "NONFINITE", "message": "é" * 600}
    data, errors = process(job, unit, pa.Table.from_pylist(answers, schema=ANSWER_SCHEMA))
    assert data.column("summary").to_pylist() == ["b"]
    assert errors.column("reason").to_pylist() == ["NONFINITE", "NULL_TEXT"]


def test_units_without_rows(tiny_bart_dir: Path, tmp_path: Path) -> None:
    job, units = prepare(tiny_bart_dir, pa.table({"text": pa.array([], pa.string())}), tmp_path)
    data, errors = process(job, units[0])
    assert (len(units), data.num_rows, errors.num_rows) == (1, 0, 0)
