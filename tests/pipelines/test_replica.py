"""The engine's thread and a replica in this process, with a tiny real model and without Ray."""

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from s2s_ray import presets
from s2s_ray.errors import InfrastructureError, RowErrorReason
from s2s_ray.pipelines import replica as module
from s2s_ray.pipelines.replica import EngineFailedError, Replica
from s2s_ray.pipelines.rows import WORK_SCHEMA, Job, from_ipc, to_ipc
from s2s_ray.pipelines.settings import GenerateSettings

POISON = 77  # a token id that makes the wrapped engine raise


class FragileEngine:
    """The real engine, but a row that holds POISON makes `add` or, once admitted, `step` raise."""

    def __init__(self, engine: Any, fail_always: bool) -> None:
        self.engine, self.fail_always, self.poisoned = engine, fail_always, False

    @property
    def has_work(self) -> bool:
        return self.poisoned or bool(self.engine.has_work)

    def add(self, requests: Any) -> None:
        self.poisoned |= any(POISON in request.token_ids for request in requests)
        self.engine.add(requests)

    def step(self) -> Any:
        if self.poisoned or self.fail_always:
            raise ZeroDivisionError("poison")
        return self.engine.step()


def make_job(preset: Path, output: Path) -> Job:
    settings = GenerateSettings(
        input=("in",), output=str(output), preset=str(preset), max_target_length=8, sampler="greedy"
    )
    return Job(settings, presets.resolve(preset).digest, "f" * 32, pa.schema([]), "run")


@pytest.fixture
def replica(tiny_bart_dir: Path, tmp_path: Path) -> Replica:
    return Replica(make_job(tiny_bart_dir, tmp_path / "out"), 1)


def work_table(sources: list[list[int] | None], first_row: int = 0) -> pa.Table:
    rows = [{"row": first_row + i, "token_ids": ids, "truncated": False} for i, ids in enumerate(sources)]
    return pa.Table.from_pylist(rows, schema=WORK_SCHEMA)


SOURCES = [[0, 10 + row, 20 + row, 2] for row in range(12)]


def test_units_share_the_engine_and_come_out_in_order(replica: Replica) -> None:
    async def three_units() -> list[pa.Table]:
        tables = [work_table(SOURCES[i : i + 4], i) for i in (0, 4, 8)]
        return await asyncio.gather(*(replica.answer(table) for table in tables))

    together = [row for table in asyncio.run(three_units()) for row in table.column("token_ids").to_pylist()]
    alone = [asyncio.run(replica.answer(work_table([ids], i))).to_pylist()[0] for i, ids in enumerate(SOURCES)]
    assert together == [row["token_ids"] for row in alone]
    assert {row["finish_reason"] for row in alone} <= {"stop", "length"}
    assert all(len(row["token_ids"]) <= 8 for row in alone)


def test_rows_that_need_no_model(replica: Replica) -> None:
    rows = work_table([None, SOURCES[0], None])
    rows = rows.set_column(5, "reason", pa.array([None, None, "NULL_TEXT"], pa.string()))
    answers = asyncio.run(replica.answer(rows)).to_pylist()
    assert answers[0]["finish_reason"] == "empty"
    assert answers[0]["token_ids"] is None and answers[1]["token_ids"] and answers[2]["finish_reason"] is None
    assert asyncio.run(replica.answer(work_table([]))).num_rows == 0


def test_a_row_that_fails_alone_is_an_error_and_its_neighbours_are_unchanged(replica: Replica) -> None:
    clean = asyncio.run(replica.answer(work_table(SOURCES)))
    make = replica.engine._make_engine
    replica.engine._make_engine = lambda: FragileEngine(make(), fail_always=False)
    replica.engine._inbox.put(_broken())  # the engine in use fails once, so that the next is a fragile one

    async def two_units() -> list[pa.Table]:
        poisoned = [*SOURCES[:5], [0, POISON, 2], *SOURCES[5:]]
        return await asyncio.gather(replica.answer(work_table(poisoned)), replica.answer(work_table(SOURCES)))

    poisoned, neighbour = (table.to_pylist() for table in asyncio.run(two_units()))
    assert poisoned[5]["reason"] == RowErrorReason.INTERNAL and "ZeroDivisionError: poison" in poisoned[5]["message"]
    expected = clean.column("token_ids").to_pylist()
    assert [row["token_ids"] for row in poisoned[:5] + poisoned[6:]] == expected
    assert [row["token_ids"] for row in neighbour] == expected


def test_an_engine_that_always_fails_is_not_blamed_on_rows(replica: Replica) -> None:
    make = replica.engine._make_engine
    replica.engine._make_engine = lambda: FragileEngine(make(), fail_always=True)
    replica.engine._inbox.put(_broken())
    with pytest.raises(EngineFailedError, match="poison"):
        asyncio.run(replica.answer(work_table(SOURCES)))


def _broken() -> Any:
    batch = module._Batch(1)
    batch.requests = [object()]  # type: ignore[list-item]
    return batch


def test_attempts_are_counted_and_bounded(replica: Replica) -> None:
    batch = pa.table({"unit": [7], "work": pa.array([to_ipc(work_table(SOURCES[:1]))], pa.large_binary())})
    for attempt in range(1, module.MAX_ATTEMPTS + 1):
        result = asyncio.run(replica(batch))
        assert result.column("attempts").to_pylist() == [attempt]
    assert from_ipc(result.column("answers")[0].as_buffer()).num_rows == 1
    with pytest.raises(InfrastructureError, match="unit 7 must not kill its worker"):
        asyncio.run(replica(batch))
