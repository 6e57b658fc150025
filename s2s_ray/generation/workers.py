"""Decoding on the cores of a CPU: several cohort decoders over the same weights, each in a thread of its own.

Two threads that share every operation wait for each other at each of them, hundreds of times a step. Here a worker with
its own rows runs its operations alone; workers meet only where rows are handed out, and where rows that have become few
are put together. While some have no rows, the others use their threads.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from s2s_ray.errors import RowErrorReason
from s2s_ray.generation.cohorts import CohortDecoder
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.kernels import cpu
from s2s_ray.models.backbone import Backbone

_MOST = 4  # beyond that a worker has several threads: all workers' Python takes turns
_LEAST_SLOTS = 16  # of a worker: one cohort
_FEW = 32  # sequences; with so few a step reads the weights and does little else, so they are read for all of them once


def worker_count(asked: int | None, max_slots: int | None) -> int:
    """How many workers there can be, one for each of torch's threads unless fewer are asked for."""
    if cpu.library() is None:
        return 1
    most = torch.get_num_threads() if max_slots is None else min(torch.get_num_threads(), max_slots // _LEAST_SLOTS)
    return max(1, min(most, asked or _MOST))


@dataclass(slots=True)
class _Worker:
    """A decoder, the rows it is to admit in its next turn, and that turn while it runs: then the rest is its own."""

    decoder: CohortDecoder
    pending: list[tuple[Any, list[Request], list[int]]] = field(default_factory=list)
    slots: int = 0  # taken, pending rows included
    tokens: int = 0
    turn: Future[list[Finished]] | None = None

    def take(self, other: "_Worker") -> None:
        """All rows of a worker, between the turns of both."""
        self.decoder.take(other.decoder)
        self.pending, other.pending = other.pending + self.pending, []
        self.slots, other.slots = self.slots + other.slots, 0
        self.tokens, other.tokens = self.tokens + other.tokens, 0

    def run(self, threads: int) -> list[Finished]:
        """Admit the pending rows, then one token for every row."""
        cpu.use_threads(threads)
        answers: list[Finished] = []
        with torch.inference_mode():
            while self.pending:
                answers += admit(self.decoder, *self.pending.pop())
            if self.decoder.busy:
                answers += self.decoder.step()
        return answers


class Workers:
    """A decoder for the engine made of several. A step ends when one of them has taken its turn."""

    def __init__(self, backbone: Backbone, budget: Budget, count: int) -> None:
        """count: of workers, at most torch's threads; slots are shared out evenly, source tokens as they come."""
        self._threads = torch.get_num_threads()
        self._share = replace(budget, slots=budget.slots // count)
        self._workers = [_Worker(CohortDecoder(backbone, self._share, None)) for _ in range(count)]
        self._chosen = self._workers[0]
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="s2s_ray worker")

    @property
    def busy(self) -> bool:
        """Whether any row is being decoded."""
        return any(worker.slots for worker in self._workers)

    @property
    def slots(self) -> int:
        """Sequences that the workers whose turn begins with the next step may decode."""
        return len(self._starting()) * self._share.slots

    def live(self) -> int:
        """Their sequences, those included that ended since their cohort was last closed up."""
        return sum(worker.slots for worker in self._starting())

    def _starting(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.slots and worker.turn is None]

    def kind(self, request: Request, limit: int) -> tuple[Any, ...]:
        """As a CohortDecoder's."""
        return self._chosen.decoder.kind(request, limit)

    def next_rows(self, scheduler: Scheduler) -> tuple[Any, list[Request]] | None:
        """The rows to admit now and their kind, for the worker between turns that has the fewest; one that has only few
        comes before one that has none.
        """
        tokens = sum(worker.tokens for worker in self._workers)
        for worker in sorted(self._workers, key=lambda worker: (not 0 < worker.slots < _FEW, worker.slots)):
            if worker.turn is None:
                found = scheduler.next_cohort(worker.slots, tokens, self._share)
                if found is not None:
                    self._chosen = worker
                    return found
        return None

    def admit(self, kind: tuple[Any, ...], requests: list[Request], limits: list[int]) -> None:
        """Hand the rows to the worker for which `next_rows` took them, to be encoded in its next turn."""
        worker, sequences = self._chosen, len(requests) * kind[1]
        worker.pending.insert(0, (kind, requests, limits))
        worker.slots += sequences
        worker.tokens += sequences * max(len(request.token_ids) for request in requests)

    def step(self) -> list[Finished]:
        """Start the turn of every worker that has rows, and wait for the first to end; the rows that are done."""
        starting = self._starting()
        few = sum(worker.slots for worker in self._workers) <= min(_FEW, self._share.slots)
        for other in starting[1:] if few else ():  # they go on together
            starting[0].take(other)
        at_work = [worker for worker in self._workers if worker.slots]
        if len(at_work) == 1 and at_work[0].turn is None:  # here, where OpenMP's threads are at hand
            answers = at_work[0].run(self._threads)
            at_work[0].slots, at_work[0].tokens = at_work[0].decoder.used()
            return answers
        for worker in () if few else starting:  # few wait for the end of the others' turns
            worker.turn = self._pool.submit(worker.run, max(1, self._threads // len(at_work)))
        wait([worker.turn for worker in at_work if worker.turn], return_when=FIRST_COMPLETED)
        answers = []
        for worker in at_work:
            if worker.turn is not None and worker.turn.done():
                turn, worker.turn = worker.turn, None
                answers += turn.result()
                worker.slots, worker.tokens = worker.decoder.used()
        return answers


def admit(decoder: Any, kind: Any, requests: list[Request], limits: Sequence[int]) -> list[Finished]:
    """Let the decoder admit the rows; where they exceed the memory, half of them at a time. The answers of those that
    exceed it alone.
    """
    try:
        decoder.admit(kind, requests, limits)
    except torch.OutOfMemoryError as error:
        if len(requests) == 1:
            return [Finished(requests[0], error=RowErrorReason.OOM_SINGLE_ROW, message=str(error)[:200])]
        middle = len(requests) // 2
        first = admit(decoder, kind, requests[:middle], limits[:middle])
        return first + admit(decoder, kind, requests[middle:], limits[middle:])
    return []
