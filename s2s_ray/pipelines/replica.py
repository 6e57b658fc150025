"""A replica: one actor with one model, whose async calls feed one engine.

Units arrive as async calls, several at a time. Their rows go into the engine together, so the tail of one unit is
filled with rows of the next. The engine has a thread of its own; a call waits for the answers to its rows.
"""

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa

from s2s_ray.errors import InfrastructureError, RowErrorReason
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.pipelines.rows import ANSWER_SCHEMA, EMPTY, Job, brief, from_ipc, to_ipc
from s2s_ray.storage import failpoint

MAX_ATTEMPTS = 10  # at one unit in one run; then it is the unit that kills its workers
HOPELESS_ROWS = 3  # if the first rows tried one by one all fail, it is not the rows
CUDA_EXIT_CODE = 70


class EngineFailedError(InfrastructureError):
    """The engine raised while these rows were in it, among others."""


class EngineThread:
    """Runs an engine in a thread of its own; rows from any thread in, futures out."""

    def __init__(self, make_engine: Callable[[], Any], num_threads: int | None) -> None:
        self._make_engine = make_engine
        self._num_threads = num_threads
        self._inbox: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="s2s_ray engine", daemon=True).start()

    def submit(self, requests: Sequence[tuple[int, Sequence[int], GenerationSettings]]) -> "Future[list[Finished]]":
        """Generate for (row id, token ids, settings); the future's answers are in the same order."""
        batch = _Batch(len(requests))
        batch.requests = [Request(*request, key=(batch, index)) for index, request in enumerate(requests)]
        if requests:
            self._inbox.put(batch)
        else:
            batch.future.set_result([])
        return batch.future

    def _run(self) -> None:
        if self._num_threads:
            import torch

            torch.set_num_threads(self._num_threads)  # OpenMP keeps the number per thread
        open_batches: set[_Batch] = set()
        engine = None
        while True:
            try:
                engine = engine or self._make_engine()
                self._take(engine, open_batches)
                for answer in engine.step():
                    batch, index = answer.request.key
                    if batch.answer(index, answer):
                        open_batches.discard(batch)
            except Exception as error:
                # Whose row it was is unknown here: the units in the engine find out by trying theirs one by one.
                _exit_if_device_is_lost(error)
                failed, engine = list(open_batches) or [self._inbox.get()], None
                open_batches.clear()
                for batch in failed:
                    failure = EngineFailedError(f"{type(error).__name__}: {error}")
                    failure.__cause__ = error
                    batch.future.set_exception(failure)

    def _take(self, engine: Any, open_batches: "set[_Batch]") -> None:
        while not self._inbox.empty() or not engine.has_work:
            batch = self._inbox.get()
            open_batches.add(batch)
            engine.add(batch.requests)


class _Batch:
    """Rows submitted together, and the answers so far."""

    def __init__(self, size: int) -> None:
        self.requests: list[Request] = []
        self.future: Future[list[Finished]] = Future()
        self._answers: list[Finished | None] = [None] * size
        self._missing = size

    def answer(self, index: int, answer: Finished) -> bool:
        """Note one answer; True if it was the last."""
        self._missing -= self._answers[index] is None
        self._answers[index] = answer
        if self._missing:
            return False
        self.future.set_result([found for found in self._answers if found is not None])
        return True


class Replica:
    """The actor class. One Ray row in is one unit; it comes out with `answers` and `attempts` added."""

    def __init__(self, job: Job, num_threads: int | None) -> None:
        # Before torch is loaded: OpenMP threads that spin while they wait starve the CPU stages on the same cores, and
        # each other. Beside one busy process it made 60 rows take 17.5 s in place of 3.9 s (docs/performance.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        import torch

        from s2s_ray import presets
        from s2s_ray.generation.engine import Engine
        from s2s_ray.seq2seq_lm import Seq2SeqLM

        self.job = job
        settings = job.settings
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        directory = presets.resolve(settings.preset, expected_digest=job.preset_digest).directory
        task = Seq2SeqLM.from_preset(directory, dtype=settings.dtype, device=device)
        self.settings = task.generation_settings.replace(**settings.generation_changes())
        self.engine = EngineThread(
            lambda: Engine(task.backbone, max_batch_tokens=settings.max_batch_tokens), num_threads
        )
        self._alone = asyncio.Lock()
        self._suspects = 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        units = batch.column("unit").to_pylist()
        attempts = [self._note_attempt(unit) for unit in units]
        works = [from_ipc(content.as_buffer()) for content in batch.column("work")]
        answers = [to_ipc(await self.answer(work)) for work in works]
        batch = batch.append_column("attempts", pa.array(attempts, pa.int32()))
        return batch.append_column("answers", pa.array(answers, pa.large_binary()))

    async def answer(self, work: pa.Table) -> pa.Table:
        """Answers aligned with the rows of `work` (see rows.py)."""
        rows = work.select(["row", "token_ids", "reason"]).to_pylist()
        wanted = [index for index, row in enumerate(rows) if row["token_ids"] is not None]
        requests = [(rows[index]["row"], rows[index]["token_ids"], self.settings) for index in wanted]
        table: list[dict[str, Any]] = [
            {"token_ids": None, "finish_reason": EMPTY if row["reason"] is None else None} for row in rows
        ]
        for index, answer in zip(wanted, await self._generate(requests), strict=True):
            table[index] = _answer(answer)
        return pa.Table.from_pylist(table, schema=ANSWER_SCHEMA)

    async def _generate(self, requests: Sequence[Any]) -> list[Finished]:
        if not self._suspects:
            try:
                return await asyncio.wrap_future(self.engine.submit(requests))
            except EngineFailedError:
                pass
        self._suspects += 1
        try:
            async with self._alone:
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
                request = Request(row_id, token_ids, settings)
                answers.append(Finished(request, error=RowErrorReason.INTERNAL, message=str(error)))
        return answers

    def _note_attempt(self, unit: int) -> int:
        """Count this attempt durably: a unit that kills its worker each time must not be tried for ever."""
        failpoint("attempt.before")
        directory = self.job.ledger.root / "attempts"
        for attempt in range(1, MAX_ATTEMPTS + 1):
            if (directory / f"{self.job.run_id}-u{unit:08d}-{attempt}").create_exclusive(b""):
                return attempt
        raise InfrastructureError(
            f"unit {unit} must not kill its worker. It was started {MAX_ATTEMPTS} times in this run and never "
            "finished; a rerun tries again"
        )


def _answer(answer: Finished) -> dict[str, Any]:
    if answer.error is not None or not answer.sequences:
        reason = answer.error or RowErrorReason.INTERNAL
        return {"reason": reason.value, "message": brief(answer.message or "no sequence was generated")}
    best = answer.sequences[0]
    return {"token_ids": best.token_ids, "finish_reason": best.finish_reason, "score": best.score}


def _exit_if_device_is_lost(error: Exception) -> None:
    """After a CUDA error every later call fails too; a new process is the only cure, and Ray starts one."""
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        os._exit(CUDA_EXIT_CODE)
