"""An independent judge of a generate job's output: reads input and output with pyarrow, shares no code with the ledger.

The input must have a column `id` that numbers its rows 0, 1, ... in input order.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

NEW_COLUMNS = ("summary", "translation", "num_tokens", "finish_reason", "truncated", "score")


@dataclass(frozen=True)
class Verdict:
    """What was found. A sound output has `lost`, `doubled` and `problems` empty."""

    rows: int
    error_rows: int
    lost: list[int]
    doubled: list[int]
    problems: list[str]
    table: pa.Table
    errors: pa.Table

    def summaries(self) -> dict[int, str]:
        return dict(zip(self.table.column("id").to_pylist(), self.table.column("summary").to_pylist(), strict=True))


def check(
    inputs: Sequence[str],
    output: str,
    filesystem: pafs.FileSystem | None = None,
    output_filesystem: pafs.FileSystem | None = None,
) -> Verdict:
    """Judge the published output: conservation (I1), order, carried columns, and the manifest's counts."""
    source_filesystem = filesystem or pafs.LocalFileSystem()
    filesystem = output_filesystem or source_filesystem
    source = pa.concat_tables([pq.read_table(path, filesystem=source_filesystem) for path in inputs])
    parts = _parts(output, filesystem)
    tables = [pq.read_table(path, filesystem=filesystem) for path in parts]
    table = pa.concat_tables(tables)
    error_parts = _parts(f"{output}/_errors", filesystem)
    errors = pa.concat_tables([pq.read_table(path, filesystem=filesystem) for path in error_parts])
    problems: list[str] = []
    ids = table.column("id").to_pylist()
    counts = Counter(ids + errors.column("row").to_pylist())
    wanted = set(source.column("id").to_pylist())
    lost = sorted(wanted - set(counts))
    doubled = sorted(row for row, count in counts.items() if count > 1)
    if set(counts) - wanted:
        problems.append(f"rows that are not in the input: {sorted(set(counts) - wanted)[:5]}")
    if ids != sorted(ids):
        problems.append("the output is not in input order")
    problems += _carried(source, table)
    problems += _error_rows(source, errors)
    problems += _manifest(output, filesystem, table, errors)
    return Verdict(table.num_rows, errors.num_rows, lost, doubled, problems, table, errors)


def _parts(directory: str, filesystem: pafs.FileSystem) -> list[str]:
    found = filesystem.get_file_info(pafs.FileSelector(directory))
    return sorted(info.path for info in found if info.base_name.startswith("part-"))


def _carried(source: pa.Table, table: pa.Table) -> list[str]:
    kept = [name for name in table.schema.names if name not in NEW_COLUMNS]
    expected = source.take(pa.array(table.column("id").to_pylist(), pa.int64())).select(kept)
    problems = []
    for name in kept:
        if table.schema.field(name).type != source.schema.field(name).type:
            problems.append(f"column {name} changed its type to {table.schema.field(name).type}")
        elif name != "text" and table.column(name).to_pylist() != expected.column(name).to_pylist():
            problems.append(f"column {name} changed its values")
        elif name == "text" and not table.column(name).combine_chunks().equals(expected.column(name).combine_chunks()):
            problems.append("the text changed")
    return problems


def _error_rows(source: pa.Table, errors: pa.Table) -> list[str]:
    problems = []
    for error in errors.to_pylist():
        if not error["reason"] or len(error["message"].encode()) > 512 or error["attempts"] < 1:
            problems.append(f"an error row says too little or too much: {error}")
    return problems


def _manifest(output: str, filesystem: pafs.FileSystem, table: pa.Table, errors: pa.Table) -> list[str]:
    with filesystem.open_input_stream(f"{output}/_manifest.json") as stream:
        manifest: dict[str, Any] = json.loads(stream.read())
    counted = {"rows": table.num_rows, "error_rows": errors.num_rows}
    return [
        f"the manifest's {name} is {manifest[name]}, there are {number}"
        for name, number in counted.items()
        if manifest[name] != number
    ]
