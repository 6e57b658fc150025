"""Decoding on a GPU: a fixed number of slots, their caches in an arena, one captured graph a step.

Rows are placed into free slots and leave them when they are done; a step always runs over all slots, and the attention
kernels skip those that are empty. Some steps are queued ahead of the host, which reads who was done after one that is
over, so that the device has work while rows are answered and others are admitted.

All rows of a lane share the kind of search, its width and the room for tokens. While they share their settings too, the
whole step, choice of tokens included, is one graph; otherwise the choice runs outside of it, with tables per row.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2s_ray.generation.arena import Arena
from s2s_ray.generation.kinds import make_search, search_kind
from s2s_ray.generation.requests import Finished, Request
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.ragged import pad_sources

LONGEST_TARGET = 2**15  # tokens; a slot is as long as the longest target it may hold
_BRIEF = 256  # source tokens; attention over sources that are no longer has small blocks
_NEVER = 2**62
_MOST_AHEAD = 4  # steps the host may be ahead of the device
_ROOM = 64  # tokens; the histories of a lane have room for a multiple of it
_SPAN = (
    1024  # source tokens; where a family has no limit, the lanes are for sources of up to this, twice this and so on
)
_OWN_SHARE, _SOURCE_SHARE = 0.2, 0.45  # of the free memory: histories, sources


class SlotDecoder:
    """The rows being decoded on one device, one kind at a time."""

    def __init__(self, backbone: Backbone, budget: Budget, sampler: Any) -> None:
        self.backbone = backbone
        self.budget = budget
        self._sampler = sampler
        self._longest_source = backbone.max_source_length
        self._lane: _Lane | None = None

    @property
    def busy(self) -> bool:
        """Whether any row is being decoded."""
        return self._lane is not None and self._lane.live > 0

    def next_rows(self, scheduler: Scheduler) -> tuple[Any, list[Request]] | None:
        """The rows to admit now and their kind."""
        if not self.busy and (waiting := scheduler.next_kind()) is not None:
            self._prepare(*waiting)
        if self._lane is None:
            return None
        return scheduler.next_cohort(*self._lane.used(), self._lane.budget, self._lane.kind)

    def _prepare(self, kind: Any, first: Request) -> None:
        limit = first.settings.length_limit(1 + len(first.prompt_ids), self.backbone.max_target_length)
        if self._lane is None or not self._lane.suits(kind, first, limit):
            if self._lane is not None:
                self._lane.settle()
            self._lane = None  # its memory goes before the next one's is taken
            self._lane = _Lane(self.backbone, self.budget, kind, first, limit, self._sampler)

    def kind(self, request: Request, limit: int) -> tuple[Any, ...]:
        """What rows must share to be decoded side by side."""
        span = self._longest_source or max(_SPAN, 1 << (len(request.token_ids) - 1).bit_length())
        return (*search_kind(request), -(-(limit + 1) // _ROOM) * _ROOM, span)

    def admit(self, kind: tuple[Any, ...], requests: list[Request], limits: list[int]) -> None:
        """Encode the rows and give them slots. Raises torch.OutOfMemoryError; nothing is held then."""
        self._lane.place(requests, limits)  # type: ignore[union-attr]

    def step(self) -> list[Finished]:
        """One token for every row; rows that are done, on CUDA a few steps later."""
        return self._lane.step() if self._lane is not None and self.busy else []

    @property
    def slots(self) -> int:
        """Sequences that may be decoded at one time."""
        return self.budget.slots if self._lane is None else self._lane.budget.slots

    def live(self) -> int:
        """Sequences being decoded."""
        return 0 if self._lane is None else self._lane.live * self._lane.width


class _Lane:
    """Slots for rows of one kind."""

    def __init__(
        self, backbone: Backbone, budget: Budget, kind: tuple[Any, ...], first: Request, limit: int, sampler: Any
    ) -> None:
        self.backbone = backbone
        self.kind = kind
        self._device = next(backbone.parameters()).device
        _, self.width, self._room, span = kind
        self.budget = _fitted(backbone, budget, self.width, self._room, span, len(first.token_ids), self._device)
        rows, source_tokens = self.budget.slots // self.width, self.budget.tokens // self.width
        self._settings = first.settings
        self._limit = limit
        self.uniform = _is_uniform(first) and sampler is None
        filler = dataclasses.replace(first, prompt_ids=())
        self.search = make_search(
            kind[0], [filler] * rows, [limit] * rows, self.width, self._device, sampler, backbone.hidden_dim
        )
        self.search.hold(self._room)
        self.arena = Arena(
            backbone,
            self.search.row["done"],
            width=self.width,
            positions=self._room,
            span=span,
            source_tokens=source_tokens,
            brief=len(first.token_ids) <= _BRIEF,
        )
        self._free = list(range(rows))[::-1]
        self.live = 0  # rows
        self._source_tokens = np.zeros(rows, np.int64)  # of the row in each place; 0 where there is none
        self._placed_at = np.full(rows, _NEVER)  # the step
        self._graph: Any = None
        self._decoded: tuple[Tensor, Tensor]
        self._flags = (
            [torch.zeros(rows, dtype=torch.bool).pin_memory() for _ in range(_MOST_AHEAD + 1)] if self._cuda else []
        )
        self._events = [torch.cuda.Event() for _ in self._flags]
        self._side = torch.cuda.Stream() if self._cuda else None
        self._steps = 0
        self._ahead = 1
        self._packed = backbone.packed
        if self._cuda and self.uniform:
            self._graph = self._capture(lambda: self._advance(*self._decode()))

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    def suits(self, kind: tuple[Any, ...], first: Request, limit: int) -> bool:
        """Whether this lane, when empty, is what rows like this one need."""
        current = self._packed is self.backbone.packed
        enough = len(first.token_ids) * self.width <= self.budget.tokens
        return current and enough and kind == self.kind and self.uniform and self._fits(first, limit)

    def settle(self) -> None:
        """Wait for the steps that are queued."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def used(self) -> tuple[int, int]:
        """Slots (sequences) and source tokens x width taken."""
        return self.live * self.width, int(self._source_tokens.sum()) * self.width

    def place(self, requests: list[Request], limits: list[int]) -> None:
        """Encode the rows and put them into free slots."""
        token_ids, sources = pad_sources([request.token_ids for request in requests], self._device)
        memory, lengths = self.backbone.encode_ragged(token_ids, sources), sources.lengths
        self._adjust()
        rows = [self._free.pop() for _ in requests]
        if self.uniform and not all(self._fits(r, limit) for r, limit in zip(requests, limits, strict=True)):
            self.uniform, self._graph = False, None
        self.arena.place(rows, lengths, memory)
        self.search.place(rows, requests, limits)
        if not self.uniform:
            self.search.refresh()
        self.live += len(rows)
        self._source_tokens[rows], self._placed_at[rows] = lengths, self._steps

    def _adjust(self) -> None:
        """Queue one step more ahead of rows to come if the device has done all before the host was through with these,
        else one less: a row that is done waits for the steps ahead.
        """
        if self._cuda and self._steps > self._placed_at[self._placed_at < _NEVER].max(initial=0):
            idle = self._events[self._steps % len(self._flags)].query()
            self._ahead = min(self._ahead + 1, _MOST_AHEAD) if idle else max(self._ahead - 1, 1)

    def _fits(self, request: Request, limit: int) -> bool:
        if request.settings is not self._settings and _shared(request.settings) != _shared(self._settings):
            return False
        limits = limit == self._limit or request.settings.forced_eos_token_id is None
        return limits and not request.prompt_ids

    def step(self) -> list[Finished]:
        """Run one step; answer what was done after one of the last."""
        self._run()
        self._steps += 1
        if not self._cuda:
            return self._answer(self.search.row["done"].numpy(), self._steps)
        now = self._steps % len(self._flags)
        self._flags[now].copy_(self.search.row["done"], non_blocking=True)
        self._events[now].record()
        if self._steps <= self._ahead:
            return []
        before = (self._steps - self._ahead) % len(self._flags)
        self._events[before].synchronize()
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._events[before])  # type: ignore[union-attr]
            return self._answer(self._flags[before].numpy(), self._steps - self._ahead)

    def _answer(self, done: Any, at: int) -> list[Finished]:
        # A row's slot may still carry the flag of the row before it.
        finished = np.flatnonzero(done & (self._placed_at < at)).tolist()
        if not finished:
            return []
        answers = self.search.collect(finished)
        self.arena.release(finished)
        self._free += finished
        self.live -= len(finished)
        self._source_tokens[finished], self._placed_at[finished] = 0, _NEVER
        return answers

    def _run(self) -> None:
        if not self._cuda:
            self._advance(*self._decode())
        elif self.uniform:
            self._graph.replay()
        else:
            self._graph = self._graph or self._capture(self._keep_decoded)
            self._graph.replay()
            logits, states = self._decoded
            self._advance(logits.clone(), states)

    def _decode(self) -> tuple[Tensor, Tensor]:
        states = self.backbone.decode_states(self.search.newest(), self.arena)
        return self.backbone.project(states), states

    def _keep_decoded(self) -> None:
        self._decoded = self._decode()

    def _advance(self, logits: Tensor, states: Tensor) -> None:
        parents = self.search.advance_in_place(logits, states)
        if parents is not None:
            self.arena.reorder(parents)

    def _capture(self, step: Any) -> Any:
        """A graph of one step. What warms up runs with every row done, so that no row moves on."""
        done = self.search.row["done"].clone()
        self.search.row["done"].fill_(True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        self.search.row["done"].copy_(done)
        return graph


def _shared(settings: GenerationSettings) -> GenerationSettings:
    """The settings without those that every row keeps for itself."""
    return dataclasses.replace(settings, seed=0, max_length=None, max_new_tokens=None)


def _is_uniform(request: Request) -> bool:
    """Whether the tables of a step can be the same for every row with these settings."""
    return not request.prompt_ids and not request.settings.encoder_no_repeat_ngram_size


def _fitted(
    backbone: Backbone, budget: Budget, width: int, room: int, span: int, longest: int, device: torch.device
) -> Budget:
    """The budget, as far as the device's memory allows it, but one row of `longest` source tokens at the least."""
    rows, tokens = max(1, budget.slots // width), budget.tokens // width
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
        each = Arena.bytes_per_position(backbone)
        rows = max(1, min(rows, int(free * _OWN_SHARE) // (each * room * width)))
        tokens = min(tokens, int(free * _SOURCE_SHARE) // each)
    tokens = max(min(tokens, rows * span), longest)
    return dataclasses.replace(budget, slots=rows * width, tokens=tokens * width)
