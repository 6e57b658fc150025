"""Requests in, finished rows out: the one loop of greedy search, sampling and beam search.

Rows wait in the scheduler, are admitted a cohort at a time (encoded together, cross-attention projected once), and
share every decoder step with all other live rows. A finished row is answered at once and its slot is refilled.
"""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from s2s_ray.errors import RowErrorReason, SettingsError
from s2s_ray.generation.cache import Cohort, DecoderCache, closing_order
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.samplers import Sampler
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.generation.search import BeamSearch, SampleSearch, Search
from s2s_ray.models.backbone import Backbone

_WINDOW = 4096  # requests read ahead of the decoder, to be sorted by length
_DEAD_SHARE = 0.1  # of a cohort; from here on its last live rows are moved into the gaps


@dataclass(slots=True)
class _Lane:
    """The live rows of one kind of search: their state and, in the same order, their cohorts."""

    search: Search
    cohorts: list[Cohort]
    answered: list[bool] = field(default_factory=list)


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made. Occupancy is `live_slot_steps / slot_steps`."""

    steps: int = 0
    slot_steps: int = 0
    live_slot_steps: int = 0
    source_tokens: int = 0
    padded_source_tokens: int = 0
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
    ) -> None:
        """max_batch_tokens: source tokens x beams decoded at one time; max_slots: sequences decoded at one time.

        sampler: only for a sampler with a `get_next_token` of its own; it then decides for every row.
        """
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_slots", max_slots)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} must be a whole number of at least 1. Received: {value!r}")
        self.backbone = backbone
        self.device = next(backbone.parameters()).device
        on_cpu = self.device.type == "cpu"
        self._budget = Budget(
            slots=max_slots or (128 if on_cpu else 512),
            tokens=max_batch_tokens or (16_384 if on_cpu else 262_144),
            cohort_rows=16 if on_cpu else 128,
        )
        self._sync_every = 1 if on_cpu else 4
        self._sampler = sampler if sampler is not None and sampler.is_custom else None
        self._scheduler = Scheduler(self._budget)
        self._lanes: dict[Hashable, _Lane] = {}
        self._answers: list[Finished] = []
        self.stats = EngineStats()
        backbone.pack()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._lanes or self._answers or len(self._scheduler))

    @property
    def max_slots(self) -> int:
        """Sequences that may be decoded at one time."""
        return self._budget.slots

    def generate(self, requests: Iterable[Request]) -> Iterator[Finished]:
        """Answer every request, in any order. Reads ahead by a window, so the input may be endless."""
        source = iter(requests)
        while True:
            room = _WINDOW - len(self._scheduler)
            if room > _WINDOW // 2:
                self.add(islice(source, room))
            if not self.has_work:
                return
            yield from self.step()

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests. One that can never run becomes an answer with an error."""
        kinds: dict[Hashable, list[Request]] = {}
        for request in requests:
            error = self._refusal(request)
            if error:
                self._answer([Finished(request, error=RowErrorReason.TOO_LONG, message=error)])
            else:
                kinds.setdefault(_kind(request), []).append(request)
        for kind, rows in kinds.items():
            self._scheduler.add(rows, kind, kind[1])  # type: ignore[index]

    def _refusal(self, request: Request) -> str:
        longest = self.backbone.max_source_length
        if longest is not None and len(request.token_ids) > longest:
            return f"source must have at most {longest} tokens, has {len(request.token_ids)}: truncate it"
        limit, prompt = self._limit(request), 1 + len(request.prompt_ids)
        if prompt >= limit:
            return f"the decoder prompt has {prompt} tokens and leaves no room below the limit of {limit}"
        return ""

    def _limit(self, request: Request) -> int:
        return request.settings.length_limit(1 + len(request.prompt_ids), self.backbone.max_target_length)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """Admit what fits, decode one token of every live row, and return the rows that finished."""
        self._admit()
        if self._lanes:
            self._decode()
            if self.stats.steps % self._sync_every == 0:
                for kind in list(self._lanes):
                    self._settle(kind)
        answers, self._answers = self._answers, []
        return answers

    def _admit(self) -> None:
        while True:
            cohorts = [cohort for lane in self._lanes.values() for cohort in lane.cohorts]
            used_slots = sum(cohort.num_sequences for cohort in cohorts)
            used_tokens = sum(cohort.num_sequences * cohort.source_length for cohort in cohorts)
            chosen = self._scheduler.next_cohort(used_slots, used_tokens)
            if chosen is None:
                return
            self._start(*chosen)

    def _start(self, kind: Any, requests: list[Request]) -> None:
        try:
            cohort = self._encode(requests, kind[1])
        except torch.OutOfMemoryError as error:
            if len(requests) == 1:
                self._answer([Finished(requests[0], error=RowErrorReason.OOM_SINGLE_ROW, message=str(error)[:200])])
                return
            middle = len(requests) // 2
            self._start(kind, requests[:middle])
            self._start(kind, requests[middle:])
            return
        limits = [self._limit(request) for request in requests]
        search: Search
        if kind[0] == "beam":
            search = BeamSearch(requests, limits, kind[1], self.device)
        else:
            search = SampleSearch(requests, limits, kind[1], self.device, self._sampler)
        lane = self._lanes.get(kind)
        if lane is None:
            self._lanes[kind] = _Lane(search, [cohort], [False] * len(requests))
            return
        lane.search.join(search)
        lane.cohorts.append(cohort)
        lane.answered += [False] * len(requests)

    def _encode(self, requests: list[Request], width: int) -> Cohort:
        rows = [torch.as_tensor(request.token_ids, dtype=torch.int64) for request in requests]
        lengths = torch.tensor([max(1, len(row)) for row in rows])
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        padding_mask = torch.arange(int(lengths.max())) < lengths[:, None]
        self.stats.source_tokens += int(lengths.sum())
        self.stats.padded_source_tokens += padding_mask.numel()
        token_ids, padding_mask = token_ids.to(self.device), padding_mask.to(self.device)
        return self.backbone.init_cache(self.backbone.encode(token_ids, padding_mask), padding_mask, width)

    def _decode(self) -> None:
        lanes = list(self._lanes.values())
        newest = [lane.search.newest() for lane in lanes]
        cache = DecoderCache([cohort for lane in lanes for cohort in lane.cohorts])
        logits = self.backbone.decode(torch.cat(newest), cache)
        for lane, scores in zip(lanes, logits.split([t.numel() for t in newest]), strict=True):
            parents = lane.search.advance(scores)
            if parents is not None:
                sizes = [cohort.num_rows for cohort in lane.cohorts]
                for cohort, moved in zip(lane.cohorts, parents.split(sizes), strict=True):
                    cohort.reorder(moved)
        self.stats.steps += 1
        self.stats.slot_steps += self._budget.slots
        self.stats.live_slot_steps += sum(lane.answered.count(False) * lane.search.width for lane in lanes)

    def _settle(self, kind: Hashable) -> None:
        """Answer the rows of a lane that are done, and give their place back once enough of a cohort is dead."""
        lane = self._lanes[kind]
        fresh = [row for row, done in enumerate(lane.search.done()) if done and not lane.answered[row]]
        if not fresh:
            return
        self._answer(lane.search.collect(fresh))
        for row in fresh:
            lane.answered[row] = True
        kept: list[int] = []
        cohorts: list[Cohort] = []
        start = 0
        for cohort in lane.cohorts:
            rows = range(start, start + cohort.num_rows)
            start += cohort.num_rows
            live = [not lane.answered[row] for row in rows]
            if not any(live):
                continue
            order = list(range(len(live)))
            if live.count(False) >= max(1, _DEAD_SHARE * len(live)):
                order = closing_order(live)
                cohort.keep(order)
            kept += [rows.start + row for row in order]
            cohorts.append(cohort)
        if not cohorts:
            del self._lanes[kind]
        elif len(kept) < len(lane.answered):
            lane.search.keep(kept)
            lane.answered = [lane.answered[row] for row in kept]
            lane.cohorts = cohorts

    def _answer(self, finished: list[Finished]) -> None:
        self._answers += finished
        self.stats.rows += len(finished)
        self.stats.errors += sum(answer.error is not None for answer in finished)
        self.stats.generated_tokens += sum(len(s.token_ids) for answer in finished for s in answer.sequences)


def _kind(request: Request) -> tuple[str, int]:
    settings = request.settings
    if settings.num_beams > 1:
        return "beam", settings.num_beams
    return "sample", settings.num_return_sequences
