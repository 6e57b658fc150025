"""A replica: one actor with one model, whose async calls feed one engine.

Units arrive as async calls, several at a time. Their rows go into the engine together, so the tail of one unit is
filled with rows of the next. A unit whose worker died again and again goes alone, and is halved until the row is found.
"""

import asyncio
import atexit
import contextlib
import gc
import os
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from s2s_ray.errors import RowErrorReason
from s2s_ray.failpoints import FAILPOINT_VARIABLE, failpoint
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.pipelines.attempts import STARTS, Attempts
from s2s_ray.pipelines.engine_thread import EngineFailedError, EngineThread, is_out_of_memory
from s2s_ray.pipelines.rows import ANSWER_SCHEMA, ROUTED, Job, brief, from_ipc, to_ipc
from s2s_ray.pipelines.segments import EMPTY

MAX_ROW_BITS = 40  # of the 64 of a request's id; the rest numbers the sentences of a row
HOPELESS_ROWS = 3  # if the first rows tried one by one all fail, it is not the rows


class Replica:
    """The actor class. One Ray row in is one unit; it comes out with `answers` and `attempts` added."""

    def __init__(self, job: Job, num_threads: int | None) -> None:
        # Before torch is loaded: OpenMP threads that spin while they wait starve the CPU stages on the same cores, and
        # each other. Beside one busy process it made 60 rows take 17.5 s in place of 3.9 s (docs/performance.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from s2s_ray import presets
        from s2s_ray.generation.engine import Engine
        from s2s_ray.generation.samplers import SpeculativeSampler
        from s2s_ray.seq2seq_lm import Seq2SeqLM

        self.job = job
        settings = job.settings
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        directory = presets.resolve(settings.preset, expected_digest=job.preset_digest).directory
        task = Seq2SeqLM.from_preset(directory, dtype=settings.dtype, device=device, quantization=settings.quantization)
        self.settings = task.generation_settings.replace(**settings.generation_changes())
        speculation = None
        if settings.sampler == "speculative":
            speculation = task.speculation(SpeculativeSampler(settings.draft_tokens, settings.draft_preset))
        self.engine = EngineThread(
            lambda slots: Engine(
                task.backbone,
                max_batch_tokens=settings.max_batch_tokens,
                max_slots=slots,
                speculation=speculation,
            ),
            num_threads,
        )
        gc.collect()
        gc.freeze()  # the collector need not walk through all of torch and the model again and again while rows come
        atexit.register(gc.unfreeze)  # at the end it may, or nanobind's modules complain
        self._room = _Room()
        self._one_at_a_time = asyncio.Lock()
        self._suspects = 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        works = [from_ipc(content.as_buffer()) for content in batch.column("work")]
        units = batch.column("unit").to_pylist()
        done = [await self._unit(unit, work) for unit, work in zip(units, works, strict=True)]
        batch = batch.append_column("attempts", pa.array([attempts for _, attempts in done], pa.int32()))
        answers = [to_ipc(answers) for answers, _ in done]
        return batch.append_column("answers", pa.array(answers, pa.large_binary()))

    async def answer(self, work: pa.Table) -> pa.Table:
        """Answers aligned with the rows of `work` (see rows.py)."""
        wanted, requests = _requests(work, self.settings)
        return _answers(work, wanted, await self._generate(requests))

    async def _unit(self, unit: int, work: pa.Table) -> tuple[pa.Table, int]:
        """(answers, number of the start that gave them)"""
        if not work.num_rows:
            return await self.answer(work), 1
        notes = Attempts(self.job.ledger, unit)
        async with self._room.shared():
            start = await asyncio.to_thread(notes.start)
            if start is not None:
                return await self.answer(work), start
        # Its workers died, or the whole run did. Nothing else is in this process now, so a death says whose it was.
        async with self._room.alone():
            return pa.concat_tables(await self._find_culprits(notes, work, 0, work.num_rows)), STARTS + 1

    async def _find_culprits(self, notes: Attempts, work: pa.Table, first: int, stop: int) -> list[pa.Table]:
        """Answers of rows first to stop - 1. Those that kill their worker are halved; a single one is given up.

        Each death ends this process; the next one gets here by the notes, and goes on from the answers that were kept.
        """
        kept = await asyncio.to_thread(notes.kept, first, stop)
        if kept is not None:
            return [from_ipc(kept)]
        if await asyncio.to_thread(notes.start_alone, first, stop) is not None:
            answers = await self.answer(work.slice(first, stop - first))
            await asyncio.to_thread(notes.keep, first, stop, to_ipc(answers))
            return [answers]
        if stop - first == 1:
            message = f"the worker died {STARTS} times with this row alone"
            crashed = {"reason": RowErrorReason.CRASHED_WORKER.value, "message": message}
            return [pa.Table.from_pylist([crashed], schema=ANSWER_SCHEMA)]
        middle = (first + stop) // 2
        halves = (first, middle), (middle, stop)
        return [table for half in halves for table in await self._find_culprits(notes, work, *half)]

    async def _generate(self, requests: Sequence[Any]) -> list[Finished]:
        if FAILPOINT_VARIABLE in os.environ:
            for row_id, _, _ in requests:
                failpoint(f"row.{row_id}")
        if not self._suspects:
            try:
                return await asyncio.wrap_future(self.engine.submit(requests))
            except EngineFailedError:
                pass
        self._suspects += 1
        try:
            async with self._one_at_a_time:
                return await self._one_by_one(requests)
        finally:
            self._suspects -= 1

    async def _one_by_one(self, requests: Sequence[Any]) -> list[Finished]:
        """After a failure: each row alone in the engine, so that only a row that fails alone becomes an error row."""
        answers: list[Finished] = []
        failures = 0
        for row_id, token_ids, settings in requests:
            try:
                (answer,) = await asyncio.wrap_future(self.engine.submit([(row_id, token_ids, settings)]))
                answers.append(answer)
            except EngineFailedError as error:
                failures += 1
                if failures == len(answers) + 1 and failures >= HOPELESS_ROWS:
                    raise
                out_of_memory = is_out_of_memory(error.__cause__)
                reason = RowErrorReason.OOM_SINGLE_ROW if out_of_memory else RowErrorReason.INTERNAL
                answers.append(Finished(Request(row_id, token_ids, settings), error=reason, message=str(error)))
        return answers


class _Room:
    """This process as a room: units share it, or one has it alone. Who wants to be alone goes before new sharers."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._inside = 0
        self._want_to_be_alone = 0

    def shared(self) -> contextlib.AbstractAsyncContextManager[None]:
        return self._enter(lambda: not self._want_to_be_alone)

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._want_to_be_alone += 1
        try:
            async with self._enter(lambda: not self._inside):
                yield
        finally:
            self._want_to_be_alone -= 1
            async with self._changed:
                self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def _enter(self, may: Callable[[], bool]) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(may)
            self._inside += 1
        try:
            yield
        finally:
            async with self._changed:
                self._inside -= 1
                self._changed.notify_all()


# The engine's thread waits while these hold the interpreter, so rows are handled in columns and not as dictionaries.


def _requests(
    work: pa.Table, settings: GenerationSettings
) -> tuple[list[int], list[tuple[int, Any, GenerationSettings]]]:
    """The positions of the rows that the model answers, and their (id, token ids, settings).

    The id is the row's, and for its further sentences one that no row has. Ids are int32 arrays.
    """
    sources = work.column("token_ids").combine_chunks()
    values, offsets = np.array(sources.values), sources.offsets.to_pylist()
    wanted = np.flatnonzero(np.asarray(sources.is_valid())).tolist()
    row_ids = (
        work.column("row").to_numpy() + (work.column("segment").to_numpy().astype(np.int64) << MAX_ROW_BITS)
    ).tolist()
    own = _routed_settings(work, settings)
    return wanted, [(row_ids[i], values[offsets[i] : offsets[i + 1]], own[i] if own else settings) for i in wanted]


def _routed_settings(work: pa.Table, settings: GenerationSettings) -> list[GenerationSettings]:
    """The settings of each row, one object for all rows of a language; none where all rows have the preset's."""
    columns = [work.column(name) for name in ROUTED]
    if all(column.null_count == len(column) for column in columns):
        return []
    made: dict[tuple[int | None, ...], GenerationSettings] = {}
    found = []
    for route in zip(*(column.to_pylist() for column in columns), strict=True):
        if route not in made:
            changes = {name: value for name, value in zip(ROUTED, route, strict=True) if value is not None}
            made[route] = settings.replace(**changes)
        found.append(made[route])
    return found


def _answers(work: pa.Table, wanted: Sequence[int], answers: Sequence[Finished]) -> pa.Table:
    """What the engine answered, aligned with `work`; rows without ids have no text to answer, or an error already."""
    count = work.num_rows
    columns: dict[str, list[Any]] = {name: [None] * count for name in ANSWER_SCHEMA.names}
    for index in np.flatnonzero(np.asarray(work.column("reason").is_null())).tolist():
        columns["finish_reason"][index] = EMPTY
    for index, answer in zip(wanted, answers, strict=True):
        if answer.error is not None or not answer.sequences:
            columns["reason"][index] = (answer.error or RowErrorReason.INTERNAL).value
            columns["message"][index] = brief(answer.message or "no sequence was generated")
            columns["finish_reason"][index] = None
            continue
        best = answer.sequences[0]
        columns["token_ids"][index] = best.token_ids
        columns["finish_reason"][index] = best.finish_reason
        columns["score"][index] = best.score
    return pa.table(columns, schema=ANSWER_SCHEMA)
