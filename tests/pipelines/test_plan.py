"""Planning: which files, which units, which fingerprint; and what is refused before any model loads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2s_ray.errors import FingerprintError, InputError
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.inputs import Footer, InputFile, find_files, output_schema, read_footers
from s2s_ray.pipelines.plan import Plan, Unit, cut
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location

TABLE = pa.table({"id": pa.array([1, 2, 3], pa.int64()), "text": ["a", "b", None]})


def settings(**changes: Any) -> GenerateSettings:
    return GenerateSettings(**{"input": ("in",), "output": "out", "preset": "p", **changes})


def write(path: Path, table: pa.Table = TABLE, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return str(path)


def schema_of(path: Path | str, **changes: Any) -> pa.Schema:
    changed = settings(input=(str(path),), **changes)
    footers, _ = read_footers(find_files(changed.input, Location.parse("/nowhere/out")), changed.skip_bad_files)
    return output_schema(footers, changed)


def test_files_folders_globs(tmp_path: Path) -> None:
    for name in (
        "b/2.parquet",
        "b/1.parquet",
        "b/_s2s/x.parquet",
        "b/.hidden.parquet",
        "b/deep/er/0.parquet",
        "a.parquet",
    ):
        write(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("no Parquet")
    output = Location.parse(tmp_path / "out")

    def found(*inputs: str) -> list[str]:
        return [f.url.removeprefix(f"{tmp_path}/") for f in find_files([f"{tmp_path}/{i}" for i in inputs], output)]

    assert found("b") == ["b/1.parquet", "b/2.parquet", "b/deep/er/0.parquet"]
    assert found("b/2.parquet", "a.parquet") == ["b/2.parquet", "a.parquet"]
    assert found("*.parquet") == ["a.parquet"]
    assert found("b/[12].parquet") == ["b/1.parquet", "b/2.parquet"]
    for inputs in (["nothing"], ["*.csv"], ["b", "b/1.parquet"]):
        with pytest.raises(InputError):
            found(*inputs)
    with pytest.raises(InputError, match="must not hold the input"):
        find_files([f"{tmp_path}/b"], Location.parse(tmp_path))


def test_files_on_other_filesystems(s3_server: str) -> None:
    for root in (f"{s3_server}/plan-input", "memory://plan-input"):
        for name in ("y.parquet", "x.parquet"):
            sink = pa.BufferOutputStream()
            pq.write_table(TABLE, sink)
            (Location.parse(root) / name).write_atomic(sink.getvalue().to_pybytes())
        files = find_files([root], Location.parse("/nowhere/out"))
        assert [f.url for f in files] == [f"{root}/x.parquet", f"{root}/y.parquet"]
        assert [f.url for f in find_files([f"{root}/*.parquet"], Location.parse("/x"))] == [f.url for f in files]
        footers, _ = read_footers(files, skip_bad=False)
        assert [footer.row_groups for footer in footers] == [(3,), (3,)]


def test_output_schema(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet")
    assert schema_of(path).names == ["id", "text", "summary", "num_tokens", "finish_reason", "truncated"]
    assert schema_of(path, columns=("id",), summary_column="s", score=True).names == [
        *("id", "s", "num_tokens", "finish_reason", "truncated", "score")
    ]
    assert schema_of(path, columns=()).names[0] == "summary"


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    path = write(tmp_path / "x.parquet", pa.table({"text": pa.array(["a", "b"]).cast(kind)}))
    assert schema_of(path).field("text").type == kind


@pytest.mark.parametrize(
    "table,changes,message",
    [
        (TABLE, {"text_column": "body"}, "--text-column must name a column of .*it has id, text"),
        (TABLE, {"columns": ("id", "title")}, "--columns must name a column .*'title'"),
        (TABLE, {"text_column": "id"}, "text column must be string, .*'id' of type int64"),
        (pa.table({"text": pa.nulls(2)}), {}, "text column must be string"),
        (pa.table({"text": [["a"]]}), {}, "text column must be string"),
        (TABLE, {"summary_column": "id"}, "must not clash .*'id'"),
        (TABLE, {"summary_column": "truncated"}, "must differ"),
        (TABLE.append_column("num_tokens", pa.array([1, 2, 3])), {}, "must not clash .*'num_tokens'"),
    ],
)
def test_refused_schemas(tmp_path: Path, table: pa.Table, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schema_of(write(tmp_path / "x.parquet", table), **changes)


def test_a_clashing_column_may_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", TABLE.append_column("num_tokens", pa.array([1, 2, 3])))
    assert schema_of(path, columns=("id",)).names[0] == "id"


@pytest.mark.parametrize("nest", ["plain", "struct", "list", "map", "dictionary"])
def test_extension_types_are_refused_and_not_run(tmp_path: Path, nest: str) -> None:
    field = pa.field(
        "x", pa.binary(), metadata={"ARROW:extension:name": "canary", "ARROW:extension:metadata": "run me"}
    )
    kinds = {
        "plain": field,
        "struct": pa.field("x", pa.struct([field])),
        "list": pa.field("x", pa.list_(field)),
        "map": pa.field("x", pa.map_(pa.string(), field)),
        "dictionary": pa.field("x", pa.list_(pa.struct([pa.field("y", pa.struct([field]))]))),
    }
    table = pa.Table.from_pylist([], schema=pa.schema([("text", pa.string()), kinds[nest]]))
    with pytest.raises(InputError, match="extension types are refused"):
        schema_of(write(tmp_path / "x.parquet", table), columns=("text",))


def test_files_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", TABLE.set_column(0, "id", pa.array([1.0, 2.0, 3.0])))
    with pytest.raises(InputError, match=r"must agree .*'id' is double in .*b.parquet and int64"):
        schema_of(tmp_path)
    assert schema_of(tmp_path, columns=("text",)).names[0] == "text"
    write(tmp_path / "b.parquet", TABLE.append_column("more", pa.array([1, 2, 3])))
    with pytest.raises(InputError, match=r"b.parquet also has 'more'"):
        schema_of(tmp_path)
    write(tmp_path / "b.parquet", TABLE.select(["text", "id"]))
    assert schema_of(tmp_path).names[:2] == ["id", "text"]
    write(tmp_path / "b.parquet", TABLE.select(["text"]))
    with pytest.raises(InputError, match=r"--columns must name a column of .*b.parquet"):
        schema_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 9, b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_unreadable_footers(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"1 of 2 are not, the first .*bad.parquet: .*--skip-bad-files"):
        schema_of(tmp_path)
    files = find_files([str(tmp_path)], Location.parse("/nowhere/out"))
    footers, skipped = read_footers(files, skip_bad=True)
    assert [Path(f.file.url).name for f in footers] == ["good.parquet"]
    assert [Path(url).name for url in skipped] == ["bad.parquet"]
    (tmp_path / "good.parquet").unlink()
    with pytest.raises(InputError, match="All 1 have an unreadable footer"):
        schema_of(tmp_path, skip_bad_files=True)


def footers(*groups: list[int]) -> list[Footer]:
    return [Footer(InputFile(f"/in/{i}", "1-1"), tuple(rows), TABLE.schema) for i, rows in enumerate(groups)]


@given(
    st.lists(st.lists(st.integers(0, 50), max_size=5), min_size=1, max_size=8), st.one_of(st.none(), st.integers(1, 40))
)
def test_units_cover_every_row_once_and_in_order(groups: list[list[int]], limit: int | None) -> None:
    units = cut(footers(*groups), limit)
    assert [unit.id for unit in units] == list(range(len(units)))
    rows = [
        (p.file.url, p.row_group, p.start + i, p.file_row + i) for u in units for p in u.pieces for i in range(p.rows)
    ]
    expected = []
    for file, sizes in enumerate(groups):
        for group, size in enumerate(sizes):
            expected += [(f"/in/{file}", group, i, sum(sizes[:group]) + i) for i in range(size)]
    assert rows == expected
    position = 0
    for unit in units:
        assert unit.first_row == position
        position += unit.rows
        assert unit.rows <= (limit or planning.LARGEST_UNIT)
    assert all(unit.rows for unit in units) or (len(units) == 1 and not expected)


def test_small_files_are_packed_and_large_groups_sliced() -> None:
    assert [unit.rows for unit in cut(footers([10], [10], [10], [10]), 20)] == [20, 20]
    assert [unit.rows for unit in cut(footers([100]), 30)] == [25, 25, 25, 25]
    assert len(cut(footers([2_500]), None)) == 20
    assert max(unit.rows for unit in cut(footers([100_000_000]), None)) == planning.LARGEST_UNIT


def test_plan_and_unit_survive_storing() -> None:
    plan = Plan(
        cut(footers([10, 3], [0], [70]), 8), schema=pa.schema([("x", pa.list_(pa.int8()))]), skipped={"/bad": "why"}
    )
    assert planning.decode(planning.encode(plan)) == plan
    assert [Unit.decode(unit.encode()) for unit in plan.units] == list(plan.units)
    empty = Plan(cut(footers([0]), 8), schema=TABLE.schema, skipped={})
    assert planning.decode(planning.encode(empty)) == empty and empty.rows == 0


def test_fingerprint_mismatch_names_the_fields(tmp_path: Path) -> None:
    files = [InputFile("/in/a", "1-1"), InputFile("/in/b", "2-2")]
    stored = planning.document(settings(), files, "digest")
    planning.check_same(stored, planning.document(settings(num_replicas="3"), files, "digest"), Location.parse("/o"))
    cases: list[tuple[dict[str, Any], str]] = [
        (planning.document(settings(num_beams=4), files, "digest"), "num_beams was None, now 4"),
        (
            planning.document(settings(seed=1, score=True), files, "digest"),
            "score was False, now True; seed was 0, now 1",
        ),
        (planning.document(settings(), files, "other"), "preset was 'digest', now 'other'"),
        (
            planning.document(settings(), files[:1], "digest"),
            r"input \(1 files added, removed or changed, the first /in/b",
        ),
        (planning.document(settings(), files[::-1], "digest"), "the order of input"),
        (planning.document(settings(), [files[0], InputFile("/in/b", "3-3")], "digest"), r"input \(1 files .*/in/b"),
    ]
    for ours, message in cases:
        assert planning.fingerprint(ours) != planning.fingerprint(stored)
        with pytest.raises(FingerprintError, match=message):
            planning.check_same(stored, ours, Location.parse("/o"))


def test_planning_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys, s2s_ray.pipelines.plan, s2s_ray.pipelines.publish, s2s_ray.pipelines.rows\n"
        "import s2s_ray.pipelines.generate\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
