"""Which rows are decoded next: longest source first, in cohorts of one kind, within the slots and tokens there are."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from s2s_ray.generation.requests import Request

_COHORTS = 4  # at least so many share the slots, so that they empty and are refilled one after another


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be decoded at one time.

    `slots` counts sequences (rows x beams). `tokens` counts source tokens, padding included, times beams. `cohort_rows`
    is how many rows are encoded together: on a CPU 8 to 16 keeps padding low and attention batched
    (docs/performance.md).
    """

    slots: int
    tokens: int
    cohort_rows: int


class Scheduler:
    """The rows that wait, by kind of search, sorted by source length."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._waiting: dict[Hashable, list[Request]] = {}
        self._widths: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def add(self, requests: Iterable[Request], kind: Hashable, width: int) -> None:
        """Queue rows of one kind; each takes `width` slots."""
        queue = self._waiting.setdefault(kind, [])
        self._widths[kind] = width
        queue.extend(requests)
        queue.sort(key=_length)

    def next_kind(self) -> tuple[Hashable, Request] | None:
        """The kind whose longest row is the longest of all, and that row."""
        if not self._waiting:
            return None
        kind = max(self._waiting, key=lambda k: _length(self._waiting[k][-1]))
        return kind, self._waiting[kind][-1]

    def next_cohort(
        self, used_slots: int, used_tokens: int, budget: Budget | None = None, kind: Hashable = None
    ) -> tuple[Hashable, list[Request]] | None:
        """The next rows to admit (of `kind`, else of `next_kind`) and their kind, or None while too little is free.

        A cohort is held back until it can be full, so that freed slots do not trickle into cohorts of one row; a row
        that exceeds the budget by itself runs alone.
        """
        budget = budget or self.budget
        if kind is None:
            kind = next(iter(self.next_kind() or ()), None)
        if kind not in self._waiting:
            return None
        queue, width = self._waiting[kind], self._widths[kind]
        tokens_each = max(1, _length(queue[-1]) * width)
        share = budget.slots // (_COHORTS * width)
        full = max(1, min(budget.cohort_rows, share, budget.tokens // tokens_each, len(queue)))
        fits = full * width <= budget.slots - used_slots and full * tokens_each <= budget.tokens - used_tokens
        if (used_slots or used_tokens) and not fits:
            return None
        cohort = queue[-full:]
        del queue[-full:]
        if not queue:
            del self._waiting[kind]
        return kind, cohort


def _length(request: Request) -> int:
    return len(request.token_ids)
