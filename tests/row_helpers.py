"""A unit read and written without Ray and without a model."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray import presets
from s2s_ray.pipelines.inputs import find_files, output_schema, read_footers
from s2s_ray.pipelines.plan import Unit, cut
from s2s_ray.pipelines.rows import ANSWER_SCHEMA, Job, from_ipc, make_shard, read_unit, to_ipc
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location


def prepare(preset: Path, table: pa.Table, directory: Path, **changes: Any) -> tuple[Job, list[Unit]]:
    path = directory / "in.parquet"
    pq.write_table(table, path, row_group_size=changes.pop("group", 1000))
    given: dict[str, Any] = {"input": (str(path),), "output": str(directory / "out"), "preset": str(preset)}
    settings = GenerateSettings(**given | changes)
    footers, _ = read_footers(find_files(settings.input, Location.parse(settings.output)), skip_bad=False)
    job = Job(settings, presets.resolve(preset).digest, "f" * 32, output_schema(footers, settings), "run")
    return job, list(cut(footers, settings.rows_per_unit or 1000))


def echo(work: pa.Table) -> pa.Table:
    """Answers that give the source's own tokens back."""
    rows = []
    for ids, reason in zip(work.column("token_ids").to_pylist(), work.column("reason").to_pylist(), strict=True):
        finish = "stop" if ids else "empty" if reason is None else None
        rows.append({"token_ids": ids, "finish_reason": finish, "score": -1.0 if ids else None})
    return pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)


def process(job: Job, unit: Unit, answers: pa.Table | None = None) -> tuple[pa.Table, pa.Table]:
    work, carried = (from_ipc(to_ipc(table)) for table in read_unit(unit, job))
    shard = make_shard(unit, work, carried, echo(work) if answers is None else answers, 2, job)
    data = pq.read_table(pa.BufferReader(shard.data))
    errors = (
        pq.read_table(pa.BufferReader(shard.errors)) if shard.errors else pa.table({"row": pa.array([], pa.int64())})
    )
    assert (data.num_rows, errors.num_rows) == (shard.rows, shard.error_rows)
    assert shard.rows + shard.error_rows == unit.rows
    assert data.schema.equals(job.schema)
    return data, errors
