"""Noised training pairs as an iterable for `Seq2SeqLM.fit`: BART's text infilling, and token masking of sources."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from s2s_ray.training.batches import Batch, BatchPlan, Examples, Ragged

Noise = Callable[[NDArray[np.int32], np.random.Generator], NDArray[np.int32]]


def infill(mask_id: int, share: float = 0.3, mean_span: float = 3.0) -> Noise:
    """Replace spans of Poisson(mean_span) tokens, `share` of the text in all, by one <mask> each (arXiv:1910.13461,
    2.2).

    Spans of length 0 insert a <mask>. The first and last token (<s>, </s>) stay.
    """

    def apply(ids: NDArray[np.int32], generator: np.random.Generator) -> NDArray[np.int32]:
        spans = max(1, round(share * (len(ids) - 2) / mean_span))
        lengths = generator.poisson(mean_span, spans)
        starts = generator.integers(1, max(2, len(ids) - 1), spans)
        covered = np.zeros(len(ids) + 1, dtype=bool)
        inserted = np.zeros(len(ids) + 1, dtype=bool)
        for start, length in zip(starts, lengths, strict=True):
            covered[start : min(start + length, len(ids) - 1)] = True
            inserted[start] |= length == 0
        result = []
        for position, token in enumerate(ids.tolist()):
            if inserted[position] or (covered[position] and not covered[position - 1]):
                result.append(mask_id)
            if not covered[position]:
                result.append(token)
        return np.array(result, dtype=np.int32)

    return apply


def mask_tokens(mask_id: int, share: float = 0.1, *, first: int = 1) -> Noise:
    """Replace a random `share` of the tokens, the `first` ones and the last excepted, by <mask>."""

    def apply(ids: NDArray[np.int32], generator: np.random.Generator) -> NDArray[np.int32]:
        hidden = generator.random(len(ids)) < share
        hidden[:first] = hidden[-1] = False
        return np.where(hidden, np.int32(mask_id), ids)

    return apply


class NoisedPairs(IterableDataset[Batch]):
    """Batches of `examples` whose sources are noised anew in each epoch; an epoch is one pass of the iterator.

    Batches follow a BatchPlan of `batch_tokens`; DataLoader workers share them out. Everything follows from `seed`.
    """

    def __init__(self, examples: Examples, noise: Noise, *, batch_tokens: int, seed: int) -> None:
        super().__init__()
        self.examples = examples
        self.noise = noise
        self.plan = BatchPlan(
            examples.sources.lengths, examples.labels.lengths, batch_tokens=batch_tokens, seed=seed, multiple=8
        )
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by the workers, which outlive an epoch

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        self.plan.epoch = int(self.epoch)
        for number, rows in enumerate(self.plan.batches()):
            if number % step == first:
                yield self._noised(rows, np.random.default_rng([self.plan.seed, self.plan.epoch, number]))

    def _noised(self, rows: NDArray[np.int64], generator: np.random.Generator) -> Batch:
        sources = Ragged.from_arrays([self.noise(self.examples.sources[row], generator) for row in rows])
        labels = Ragged.from_arrays([self.examples.labels[row] for row in rows])
        return Examples(sources, labels, self.examples.start, self.examples.pad).collate(range(len(rows)), 8)


class Epochs:
    """The DataLoader over NoisedPairs that `fit` iterates once an epoch, with as many batches as its epoch has."""

    def __init__(self, data: NoisedPairs, workers: int) -> None:
        self.data = data
        self.done = 0
        options: dict[str, Any] = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
        self.loader = DataLoader(data, batch_size=None, num_workers=workers, **options)

    def __iter__(self) -> Iterator[Batch]:
        self.data.epoch.fill_(self.done)
        self.done += 1
        return iter(self.loader)

    def real_tokens(self) -> int:
        """Source and target tokens of an epoch."""
        return int(self.data.examples.sources.lengths.sum() + self.data.examples.labels.lengths.sum())
