"""Which rows each optimizer step trains on, whatever the number of workers.

A step is a fixed number of micro-batches of bounded padded size. They are dealt to the workers in turn, so a worker
alone takes them one after another (gradient accumulation) and many take them at once, with the same loss. Steps are a
function of seed and lengths: the number of steps done is the whole position in the data.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import SettingsError
from s2s_ray.training.batches import Batch, BatchPlan, Examples

Rows = NDArray[np.int64]
T = TypeVar("T")


@dataclass(slots=True)
class StepPlan:
    """The steps of a training run: `epochs` epochs of `plan`'s batches, `micro_batches` a step, at most `max_steps`.

    An epoch's last step may be smaller. Raises SettingsError without rows.
    """

    plan: BatchPlan
    micro_batches: int
    epochs: int | None = 1
    max_steps: int | None = None
    ends: list[int] = field(init=False)  # the number of steps done at the end of each epoch
    _batches: tuple[int, list[Rows]] = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.plan.sources):
            raise SettingsError("the training data must hold at least one pair. Received: none")
        if self.epochs is None and self.max_steps is None:
            raise SettingsError("epochs or max_steps must be given")
        self._batches = (-1, [])
        lengths: list[int] = []
        while len(lengths) != self.epochs and sum(lengths) < (self.max_steps or float("inf")):
            lengths.append(-(-len(self._epoch(len(lengths))) // self.micro_batches))
        self.ends = list(accumulate(lengths))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return min(self.ends[-1], self.max_steps or self.ends[-1])

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) of step `step` (from 0)."""
        return bisect_right(self.ends, step)

    def rows(self, step: int) -> list[Rows]:
        """The micro-batches of a step, as row numbers."""
        epoch = self.epoch_of(step)
        start = (step - (self.ends[epoch - 1] if epoch else 0)) * self.micro_batches
        return self._epoch(epoch)[start : start + self.micro_batches]

    def target_tokens(self, step: int) -> float:
        """Real target tokens of a step, over all workers."""
        return float(sum(self.plan.targets[rows].sum() for rows in self.rows(step)))

    def _epoch(self, epoch: int) -> list[Rows]:
        if self._batches[0] != epoch:
            self._batches = epoch, replace(self.plan, epoch=epoch).batches()
        return self._batches[1]


def deal(items: Sequence[T], rank: int, size: int) -> list[tuple[int, T] | None]:
    """A worker's share of a step's items, with their places among all; every worker's share is of one length, filled
    up with None.
    """
    return [(i, items[i]) if i < len(items) else None for i in range(rank, -(-len(items) // size) * size, size)]


def worker_batches(examples: Examples, steps: StepPlan, start: int, rank: int, size: int) -> Iterator[Batch]:
    """A worker's micro-batches from step `start` (from 0) to the end, seeded by step and place, not by worker."""
    for step in range(start, steps.total_steps):
        for share in deal(steps.rows(step), rank, size):
            if share is None:
                yield Batch.empty(examples.pad)
                continue
            place, rows = share
            batch = examples.collate(rows, steps.plan.multiple)
            batch.seed = int(np.random.SeedSequence([steps.plan.seed, step, place]).generate_state(1)[0])
            yield batch
