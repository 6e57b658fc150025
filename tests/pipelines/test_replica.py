"""The engine's thread and a replica in this process, with a tiny real model and without Ray."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from s2s_ray import presets
from s2s_ray.errors import RowErrorReason
from s2s_ray.pipelines.attempts import STARTS, Attempts
from s2s_ray.pipelines.engine_thread import EngineFailedError, _Batch
from s2s_ray.pipelines.replica import Replica
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
    rows = [{"row": first_row + i, "segment": 0, "token_ids": ids, "truncated": False} for i, ids in enumerate(sources)]
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
    rows = rows.set_column(
        WORK_SCHEMA.get_field_index("reason"), "reason", pa.array([None, None, "NULL_TEXT"], pa.string())
    )
    answers = asyncio.run(replica.answer(rows)).to_pylist()
    assert answers[0]["finish_reason"] == "empty"
    assert answers[0]["token_ids"] is None and answers[1]["token_ids"] and answers[2]["finish_reason"] is None
    assert asyncio.run(replica.answer(work_table([]))).num_rows == 0


def test_a_row_that_fails_alone_is_an_error_and_its_neighbours_are_unchanged(replica: Replica) -> None:
    clean = asyncio.run(replica.answer(work_table(SOURCES)))
    make = replica.engine._make_engine
    replica.engine._make_engine = lambda slots: FragileEngine(make(slots), fail_always=False)
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
    replica.engine._make_engine = lambda slots: FragileEngine(make(slots), fail_always=True)
    replica.engine._inbox.put(_broken())
    with pytest.raises(EngineFailedError, match="poison"):
        asyncio.run(replica.answer(work_table(SOURCES)))


def _broken() -> Any:
    batch = _Batch(1)
    batch.requests = [object()]  # type: ignore[list-item]
    return batch


def as_batch(sources: list[list[int]]) -> pa.Table:
    return pa.table({"unit": [7], "work": pa.array([to_ipc(work_table(sources))], pa.large_binary())})


def answers_of(result: pa.Table) -> list[dict[str, Any]]:
    return from_ipc(result.column("answers")[0].as_buffer()).to_pylist()


def test_starts_are_counted_and_a_unit_that_never_came_back_goes_alone(replica: Replica) -> None:
    batch = as_batch(SOURCES[:3])
    expected = None
    for start in range(1, STARTS + 3):
        result = asyncio.run(replica(batch))
        assert result.column("attempts").to_pylist() == [min(start, STARTS + 1)]
        expected = expected or answers_of(result)
        assert answers_of(result) == expected
    names = Attempts(replica.job.ledger, 7).ledger.attempts.list_names()
    assert names == ["u00000007.0-3.1", "u00000007.0-3.answers", *(f"u00000007.{n}" for n in (1, 2, 3))]


@pytest.mark.parametrize("culprits", [[5], [0, 11], [6, 7, 8], list(range(12))])
def test_rows_that_kill_their_worker_are_found_and_the_rest_is_answered(
    replica: Replica, culprits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9, without Ray: the process dies each time a culprit reaches the engine; its successor goes on by the notes."""
    expected = answers_of(asyncio.run(replica(as_batch(SOURCES))))
    shutil.rmtree(replica.job.ledger.attempts.path)
    submit = replica.engine.submit
    tried = []

    def dies(requests: Any) -> Any:
        tried.append([row for row, _, _ in requests])
        if any(row in culprits for row in tried[-1]):
            raise Death
        return submit(requests)

    class Death(BaseException):
        """Nothing in the replica catches it, so it ends the call as the end of the process would."""

    monkeypatch.setattr(replica.engine, "submit", dies)
    for _deaths in range(100):
        try:
            result = asyncio.run(replica(as_batch(SOURCES)))
            break
        except Death:
            continue
    answers = answers_of(result)
    assert [row for row in range(12) if answers[row]["reason"] == "CRASHED_WORKER"] == culprits
    assert [a for row, a in enumerate(answers) if row not in culprits] == [
        a for row, a in enumerate(expected) if row not in culprits
    ]
    assert "died 3 times" in answers[culprits[0]]["message"]
    good = [rows for rows in tried if not set(rows) & set(culprits)]
    assert len(good) == len({tuple(rows) for rows in good}), "answers of an earlier process were not kept"
    assert max(tried.count([row]) for row in culprits) == STARTS


def test_a_suspect_is_alone_in_the_process(replica: Replica) -> None:
    notes = Attempts(replica.job.ledger, 7)
    assert [notes.start() for _ in range(STARTS + 1)] == [1, 2, 3, None]
    inside: list[int] = []
    together: list[set[int]] = []
    answer = replica.answer

    async def watched(work: pa.Table) -> pa.Table:
        number = work.num_rows
        inside.append(number)
        together.append(set(inside))
        result = await answer(work)
        await asyncio.sleep(0.01)
        inside.remove(number)
        return result

    replica.answer = watched  # type: ignore[method-assign]

    async def calls() -> None:
        others = [as_batch(SOURCES[:n]).set_column(0, "unit", pa.array([n])) for n in (1, 2, 3)]
        await asyncio.gather(*map(replica, [others[0], as_batch(SOURCES), *others[1:]]))

    asyncio.run(calls())
    assert {12} in together and not [group for group in together if 12 in group and len(group) > 1]


class SmallDevice:
    """The real engine on a device that holds `room` live sequences."""

    def __init__(self, engine: Any, room: int) -> None:
        self.engine, self.room = engine, room
        self.max_slots = engine.max_slots

    @property
    def has_work(self) -> bool:
        return bool(self.engine.has_work)

    def add(self, requests: Any) -> None:
        self.engine.add(requests)

    def step(self) -> Any:
        answers = self.engine.step()
        if self.engine._decoder.live() > self.room:
            raise torch.OutOfMemoryError("out of memory")
        return answers


@pytest.mark.parametrize("room", [1, 3, 5])
def test_out_of_memory_while_decoding_halves_what_runs_and_keeps_to_it(replica: Replica, room: int) -> None:
    """P13: no row is lost to it; the later engines start with the smaller size."""
    expected = asyncio.run(replica.answer(work_table(SOURCES))).to_pylist()
    make = replica.engine._make_engine
    sizes: list[int | None] = []

    def small(slots: int | None) -> SmallDevice:
        sizes.append(slots)
        return SmallDevice(make(slots), room)

    replica.engine._make_engine = small
    replica.engine._inbox.put(_broken())

    async def two_units() -> list[pa.Table]:
        return await asyncio.gather(*(replica.answer(work_table(SOURCES[i : i + 6], i)) for i in (0, 6)))

    together = [row for table in asyncio.run(two_units()) for row in table.to_pylist()]
    assert together == expected
    assert sizes[:3] == [None, 64, 32] and (sizes[-1] or 0) >= room // 2 and len(sizes) <= 9
    assert asyncio.run(replica.answer(work_table(SOURCES))).to_pylist() == expected
    assert sizes[-1] == min(size for size in sizes if size), "the smaller size was not kept"


def test_a_row_too_large_for_the_device_alone(replica: Replica) -> None:
    make = replica.engine._make_engine

    class Tiny(SmallDevice):
        def add(self, requests: Any) -> None:
            self.room = 0 if any(POISON in request.token_ids for request in requests) else 99
            super().add(requests)

    replica.engine._make_engine = lambda slots: Tiny(make(slots), 99)
    replica.engine._inbox.put(_broken())
    answers = asyncio.run(replica.answer(work_table([SOURCES[0], [0, POISON, 2], *SOURCES[1:4]]))).to_pylist()
    assert [row["reason"] for row in answers] == [None, "OOM_SINGLE_ROW", None, None, None]
