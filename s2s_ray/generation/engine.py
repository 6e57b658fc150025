"""Requests in, finished rows out: the one loop of greedy search, sampling and beam search.

Rows wait in the scheduler and are admitted a cohort at a time: encoded together, cross-attention projected once. They
share every decoder step with all other live rows; a finished row is answered and its slot is refilled. How a step runs
is the decoder's affair: `cohorts.py` on a CPU, several of them by `workers.py`; `slots.py` on a GPU; `speculative.py`
where asked for.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch

from s2s_ray.errors import RowErrorReason, SettingsError
from s2s_ray.generation.cohorts import CohortDecoder
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.samplers import Sampler
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.generation.slots import LONGEST_TARGET, SlotDecoder
from s2s_ray.generation.speculative import Speculation, SpeculativeDecoder
from s2s_ray.generation.workers import Workers, admit, worker_count
from s2s_ray.models.backbone import Backbone

_WINDOW = 4096  # requests read ahead of the decoder, at least, to be sorted by length
_COHORT_SHARE = 16  # of the slots of a GPU that are refilled together
_UNBOUNDED = 2**40  # source tokens; what memory there is decides then


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made. Occupancy is `live_slot_steps / slot_steps`; a slot is live until its row is
    answered, on CUDA up to four steps after its last token.
    """

    steps: int = 0
    slot_steps: int = 0
    live_slot_steps: int = 0
    source_tokens: int = 0
    generated_tokens: int = 0
    rows: int = 0
    errors: int = 0


class Engine:
    """Generates for any number of rows with settings of their own, in any order of completion. Not thread-safe."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        max_batch_tokens: int | None = None,
        max_slots: int | None = None,
        sampler: Sampler | None = None,
        decoding: Literal["auto", "cohorts", "slots"] = "auto",
        speculation: Speculation | None = None,
        num_workers: int | None = None,
    ) -> None:
        """max_batch_tokens: source tokens x beams decoded at one time; max_slots: sequences decoded at one time.

        sampler: only for a sampler with a `get_next_token` of its own; it then decides for every row. decoding: "auto"
        is "slots" (fixed places, captured steps) on CUDA and "cohorts" elsewhere. speculation: greedy rows alone,
        several tokens a step. num_workers: on a CPU, decoders with rows of their own that share torch's threads (see
        `Workers`); by default one for each thread, at most four; a sampler of one's own is called in one thread alone.
        """
        given = {"max_batch_tokens": max_batch_tokens, "max_slots": max_slots, "num_workers": num_workers}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} must be a whole number of at least 1. Received: {value!r}")
        self.backbone = backbone
        self.device = next(backbone.parameters()).device
        on_cpu = self.device.type == "cpu"
        in_slots = speculation is None and (decoding == "slots" or (decoding == "auto" and not on_cpu))
        custom = sampler if sampler is not None and sampler.is_custom else None
        alone = not on_cpu or in_slots or speculation is not None or custom is not None
        workers = 1 if alone else worker_count(num_workers, max_slots)
        slots = max_slots or (128 * workers if on_cpu else 2048)
        self._budget = Budget(
            slots=slots,
            tokens=max_batch_tokens or (16_384 if on_cpu else _UNBOUNDED),
            cohort_rows=16 if on_cpu else max(1, slots // _COHORT_SHARE),
        )
        self._longest = LONGEST_TARGET if in_slots else None
        self._longest_source, self._family_limit = backbone.max_source_length, backbone.max_target_length
        self._window = max(_WINDOW, 4 * slots)
        self._scheduler = Scheduler(self._budget)
        self._answers: list[Finished] = []
        self.stats = EngineStats()
        backbone.pack()
        self._decoder: CohortDecoder | SlotDecoder | SpeculativeDecoder | Workers
        if speculation is not None:
            self._decoder = SpeculativeDecoder(backbone, self._budget, speculation)
        elif workers > 1:
            self._decoder = Workers(backbone, self._budget, workers)
        else:
            self._decoder = (SlotDecoder if in_slots else CohortDecoder)(backbone, self._budget, custom)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._decoder.busy or self._answers or len(self._scheduler))

    @property
    def max_slots(self) -> int:
        """Sequences that may be decoded at one time."""
        return self._budget.slots

    def generate(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Answer every request, in any order. Reads ahead by a window, so the input may be endless."""
        source = iter(requests)
        while True:
            room = self._window - len(self._scheduler)
            if room > self._window // 2:
                self.add(islice(source, room))
            if not self.has_work:
                return
            yield from self.step()

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests. One that can never run becomes an answer with an error."""
        kinds: dict[Hashable, list[Request]] = {}
        for request in requests:
            limit = self._limit(request)
            error = self._refusal(request, limit)
            if error:
                self._answer([Finished(request, error=RowErrorReason.TOO_LONG, message=error)])
            else:
                kinds.setdefault(self._decoder.kind(request, limit), []).append(request)
        for kind, rows in kinds.items():
            self._scheduler.add(rows, kind, kind[1])  # type: ignore[index]

    def _refusal(self, request: Request, limit: int) -> str:
        longest = self._longest_source
        if longest is not None and len(request.token_ids) > longest:
            return f"source must have at most {longest} tokens, has {len(request.token_ids)}: truncate it"
        prompt = 1 + len(request.prompt_ids)
        if prompt >= limit:
            return f"the decoder prompt has {prompt} tokens and leaves no room below the limit of {limit}"
        if self._longest is not None and limit > self._longest:
            return f"max_length must be at most {self._longest} tokens on this device. Received: {limit}"
        return ""

    def _limit(self, request: Request) -> int:
        return request.settings.length_limit(1 + len(request.prompt_ids), self._family_limit)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Admit what fits, decode one token of every live row, and return the rows that finished."""
        with torch.cuda.device(self.device if self.device.type == "cuda" else -1):
            while (chosen := self._decoder.next_rows(self._scheduler)) is not None:
                self._start(*chosen)
            if self._decoder.busy:
                self.stats.steps += 1
                self.stats.slot_steps += self._decoder.slots
                self.stats.live_slot_steps += self._decoder.live()
                self._answer(self._decoder.step())
        answers, self._answers = self._answers, []
        return answers

    def _start(self, kind: Any, requests: list[Request]) -> None:
        self._answer(admit(self._decoder, kind, requests, [self._limit(request) for request in requests]))
        self.stats.source_tokens += sum(len(request.token_ids) for request in requests)

    def _answer(self, finished: list[Finished]) -> None:
        self._answers += finished
        self.stats.rows += len(finished)
        self.stats.errors += sum(answer.error is not None for answer in finished)
        self.stats.generated_tokens += sum(len(s.token_ids) for answer in finished for s in answer.sequences)
