"""The engine in a thread of its own: rows from any thread in, futures out, and a new engine after a failure."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from s2s_ray.errors import InfrastructureError
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.settings import GenerationSettings

CUDA_EXIT_CODE = 70


class EngineFailedError(InfrastructureError):
    """The engine raised while these rows were in it, among others."""


class EngineThread:
    """Runs an engine made by `make_engine(max_slots)`; None lets the engine choose."""

    def __init__(self, make_engine: Callable[[int | None], Any], num_threads: int | None) -> None:
        self._make_engine = make_engine
        self._num_threads = num_threads
        self._inbox: queue.SimpleQueue[_Batch] = queue.SimpleQueue()
        self._open: set[_Batch] = set()
        self._slots: int | None = None
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
        engine = None
        while True:
            try:
                engine = engine or self._new_engine()
                self._take(engine)
                for answer in engine.step():
                    batch, index = answer.request.key
                    if batch.answer(index, answer):
                        self._open.discard(batch)
            except Exception as error:
                _exit_if_device_is_lost(error)
                if not self._halve(error, engine):
                    self._fail(error)
                engine = None

    def _new_engine(self) -> Any:
        engine = self._make_engine(self._slots)
        for batch in self._open:  # of an engine that ran out of memory
            engine.add(batch.unanswered())
        return engine

    def _take(self, engine: Any) -> None:
        while not self._inbox.empty() or not engine.has_work:
            batch = self._inbox.get()
            self._open.add(batch)
            engine.add(batch.requests)

    def _halve(self, error: Exception, engine: Any) -> bool:
        """After running out of memory: True if half as many sequences may do. The next engines keep to that."""
        if not is_out_of_memory(error) or engine is None or engine.max_slots == 1:
            return False
        self._slots = max(1, engine.max_slots // 2)
        return True

    def _fail(self, error: Exception) -> None:
        """Whose row it was is unknown here: the units in the engine find out by trying theirs one by one."""
        failed = list(self._open) or [self._inbox.get()]
        self._open.clear()
        for batch in failed:
            failure = EngineFailedError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error.with_traceback(None)  # its frames would hold the engine's tensors
            batch.future.set_exception(failure)


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

    def unanswered(self) -> list[Request]:
        return [request for request, answer in zip(self.requests, self._answers, strict=True) if answer is None]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, on a GPU or (which torch tells in words only) on a CPU."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")  # by name: torch need not be loaded
    return named or "can't allocate memory" in str(error)


def _exit_if_device_is_lost(error: Exception) -> None:
    """After a CUDA error every later call fails too; a new process is the only cure, and Ray starts one."""
    if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
        os._exit(CUDA_EXIT_CODE)
