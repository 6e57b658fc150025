"""Decoding on a CPU: rows admitted together stay together as a cohort, with a cache as tight as their sources.

A step runs every linear layer over the live rows of all cohorts at once and attention cohort by cohort.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2s_ray.generation.cache import Cohort, DecoderCache, closing_order
from s2s_ray.generation.kinds import make_search, search_kind
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.generation.search import Search
from s2s_ray.generation.selection import Best
from s2s_ray.kernels import cpu
from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.ragged import pad_sources

_DEAD_SHARE = 0.1  # of a cohort; from here on its last live rows are moved into the gaps
_PADDING_SHARE = 0.1  # of a cohort's sources; from here on they are encoded without it


@dataclass(slots=True)
class _Lane:
    """The live rows of one kind of search: their state and, in the same order, their cohorts."""

    search: Search
    cohorts: list[Cohort]
    answered: list[bool]


class CohortDecoder:
    """The rows being decoded, of any number of kinds."""

    def __init__(self, backbone: Backbone, budget: Budget, sampler: Any) -> None:
        self.backbone = backbone
        self.budget = budget
        self._device = next(backbone.parameters()).device
        if self._device.type == "cpu":
            cpu.keep_memory()
        self._relative = backbone.position_tables() is not None  # padded rows share what is added to their scores
        self._sampler = sampler
        self._lanes: dict[Hashable, _Lane] = {}

    @property
    def busy(self) -> bool:
        """Whether any row is being decoded."""
        return bool(self._lanes)

    def kind(self, request: Request, limit: int) -> tuple[Any, ...]:
        """What rows must share to be decoded by one search."""
        return search_kind(request)

    def next_rows(self, scheduler: Scheduler) -> tuple[Any, list[Request]] | None:
        """The rows to admit now and their kind."""
        return scheduler.next_cohort(*self.used(), self.budget)

    def used(self) -> tuple[int, int]:
        """Slots and source tokens that are taken."""
        cohorts = [cohort for lane in self._lanes.values() for cohort in lane.cohorts]
        slots = sum(cohort.num_sequences for cohort in cohorts)
        return slots, sum(cohort.num_sequences * cohort.source_length for cohort in cohorts)

    def admit(self, kind: tuple[Any, ...], requests: list[Request], limits: list[int]) -> None:
        """Encode the rows as a new cohort. Raises torch.OutOfMemoryError; nothing is held then."""
        cohort = self._encode(requests, kind[1])
        search = make_search(kind[0], requests, limits, kind[1], self._device, self._sampler, self.backbone.hidden_dim)
        self._join(kind, _Lane(search, [cohort], [False] * len(requests)))

    def take(self, other: "CohortDecoder") -> None:
        """All rows of a decoder of the same model, which then has none."""
        while other._lanes:
            self._join(*other._lanes.popitem())

    def _join(self, kind: Hashable, lane: _Lane) -> None:
        mine = self._lanes.setdefault(kind, lane)
        if mine is not lane:
            mine.search.join(lane.search)
            mine.cohorts += lane.cohorts
            mine.answered += lane.answered

    def _encode(self, requests: list[Request], width: int) -> Cohort:
        token_ids, rows = pad_sources([request.token_ids for request in requests], self._device)
        if rows.inside.sum() <= (1 - _PADDING_SHARE) * rows.inside.size and not self._relative:
            return self.backbone.init_ragged_cache(self.backbone.encode_ragged(token_ids, rows), rows, width)
        return self.backbone.init_cache(self.backbone.encode(token_ids, rows.padding_mask), rows.padding_mask, width)

    def step(self) -> list[Finished]:
        """One token for every row; the rows that are done now."""
        lanes = list(self._lanes.values())
        newest = [lane.search.newest() for lane in lanes]
        cache = DecoderCache([cohort for lane in lanes for cohort in lane.cohorts])
        states = self.backbone.decode_states(torch.cat(newest), cache)
        for lane, hidden in zip(lanes, states.split([t.numel() for t in newest]), strict=True):
            parents = lane.search.advance(self._scores(lane.search, hidden), hidden)
            if parents is not None:
                sizes = [cohort.num_rows for cohort in lane.cohorts]
                for cohort, moved in zip(lane.cohorts, parents.split(sizes), strict=True):
                    cohort.reorder(moved)
        return [answer for kind in list(self._lanes) for answer in self._settle(kind)]

    def _scores(self, search: Search, states: Tensor) -> Tensor | Best:
        head, needs = self.backbone.packed, search.needs()
        if needs is not None and isinstance(head, cpu.Product):
            return head.best(states, needs[0], normaliser=needs[1])
        return self.backbone.project(states)

    @property
    def slots(self) -> int:
        """Sequences that may be decoded at one time."""
        return self.budget.slots

    def live(self) -> int:
        """Sequences being decoded."""
        return sum(lane.answered.count(False) * lane.search.width for lane in self._lanes.values())

    def _settle(self, kind: Hashable) -> list[Finished]:
        """Answer the rows of a lane that are done, and give their place back once enough of a cohort is dead."""
        lane = self._lanes[kind]
        fresh = [row for row, done in enumerate(lane.search.done()) if done and not lane.answered[row]]
        if not fresh:
            return []
        answers = lane.search.collect(fresh)
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
        return answers
