"""A run of the ledger without Ray or a model: real input, real shards, made-up summaries. Drives fault tests."""

import copy
import dataclasses
import os
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.inputs import find_files, output_schema, read_footers
from s2s_ray.pipelines.ledger import Ledger, Shard
from s2s_ray.pipelines.plan import Plan, Unit
from s2s_ray.pipelines.publish import build_manifest, finished, publish, publish_mode
from s2s_ray.pipelines.rows import ERROR_SCHEMA
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location


class LedgerRun:
    """Everything a driver does around the model; `drive` may be called again and again, by any number of processes."""

    def __init__(
        self, inputs: list[str], output: str, rows_per_unit: int = 4, mode: str = "auto", compression: str = "snappy"
    ) -> None:
        """Runs that differ in `compression` alone are attempts at the same rows whose shards differ in their bytes."""
        self.settings = GenerateSettings(
            input=tuple(inputs), output=output, preset="none", rows_per_unit=rows_per_unit, publish=mode
        )
        self.inputs = inputs
        self.output = Location.parse(output)
        files = find_files(inputs, self.output)
        footers, skipped = read_footers(files, skip_bad=False)
        schema = output_schema(footers, self.settings)
        self.plan = Plan(planning.cut(footers, rows_per_unit), schema, skipped)
        self.document = planning.document(self.settings, files, "no preset")
        self.ledger = Ledger(self.output, planning.fingerprint(self.document))
        self._compression = compression
        source = pa.concat_tables([pq.read_table(path) for path in inputs])
        self.shards = [self._shard(unit, source) for unit in self.plan.units]

    def to(self, output: str) -> "LedgerRun":
        """The same run with another output."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, output=output)
        other.output = Location.parse(output)
        other.ledger = Ledger(other.output, self.ledger.fingerprint)
        return other

    def drive(self) -> int:
        """Resume and finish the run; returns the number of units this call generated."""
        if finished(self.ledger) is not None:
            return 0
        self.ledger.claim(self.document)
        plan = self.ledger.store_plan(self.plan)
        committed = self.ledger.committed()
        missing = [unit for unit in plan.units if unit.id not in committed]
        for unit in missing:
            self.ledger.commit(unit.id, unit.rows, self.shards[unit.id])
        mode = publish_mode(self.output, self.settings.publish)
        publish(self.ledger, build_manifest(self.ledger, plan, self.document, mode))
        return len(missing)

    def _shard(self, unit: Unit, source: pa.Table) -> Shard:
        """Row ids that end in 3 are errors."""
        rows = source.slice(unit.first_row, unit.rows)
        ids = rows.column("id").to_pylist()
        good = rows.filter(pa.array([row % 10 != 3 for row in ids]))
        new = {"summary": [f"summary of {row}" for row in good.column("id").to_pylist()]}
        new |= {"num_tokens": [3] * len(good), "finish_reason": ["stop"] * len(good), "truncated": [False] * len(good)}
        columns = [*good.columns, *(pa.array(new[f.name], f.type) for f in self.plan.schema if f.name in new)]
        bad = [row for row in ids if row % 10 == 3]
        error = {"unit": unit.id, "source": "x", "reason": "INTERNAL", "message": "", "input_sha256": "", "attempts": 1}
        errors = pa.Table.from_pylist([error | {"row": row, "source_row": row} for row in bad], schema=ERROR_SCHEMA)
        has_errors = bool(bad) or unit.id == 0
        return Shard(
            self._bytes(pa.Table.from_arrays(columns, schema=self.plan.schema)),
            len(good),
            self._bytes(errors) if has_errors else None,
            len(bad),
            3 * len(good),
            {"INTERNAL": len(bad)} if bad else {},
        )

    def _bytes(self, table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=self._compression)
        return sink.getvalue().to_pybytes()


def in_child(action: Callable[[], object], failpoint: str = "") -> int:
    """Start `action` in a forked process with this failpoint; returns the pid for `exit_code`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ["S2S_RAY_FAILPOINT"] = failpoint
        action()
        code = 0
    except BaseException:
        if not failpoint:
            traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def new_output(directory: Path) -> str:
    return str(directory / f"out-{uuid.uuid4().hex[:8]}")
