"""Training examples as ragged ids, cut into batches of a bounded number of tokens.

Dimensions: B rows, S source, T target.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2s_ray.errors import InputError, SettingsError
from s2s_ray.nn.packing import PackedRows, Packing

_STRIP_TOKENS = 8  # sources that differ by less are sorted by their targets


@dataclass(slots=True)
class Batch:
    """What one forward pass takes, on one device.

    `inputs` are the preprocessor's: `encoder_token_ids` int64 `[B, S]`, `encoder_padding_mask` bool `[B, S]`, and
    the same for the decoder, `[B, T]`. labels int64 `[B, T]`, weights fp32 `[B, T]` (0 for padding). `real_tokens` and
    `padded_tokens` count source and target together; `target_weight` is the sum of the weights, known without the
    device. `seed` is what dropout draws from; None leaves torch's generator as it is. `packing` says where the rows
    are in a batch that `packed` made. `whole` is the batch of which this one is a worker's share.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    weights: Tensor
    real_tokens: int
    padded_tokens: int
    target_weight: float
    seed: int | None = None
    packing: Packing | None = None
    whole: "Batch | None" = None

    @classmethod
    def empty(cls, pad: int) -> "Batch":
        """One row of padding without weight: for a worker that has no row in a step the others take."""
        ids, mask = torch.full((1, 1), pad), torch.ones(1, 1, dtype=torch.bool)
        inputs = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (("token_ids", ids), ("padding_mask", mask))
        }
        return cls(inputs, ids, torch.zeros(1, 1), 0, 2, 0.0)

    @classmethod
    def from_arrays(cls, x: Mapping[str, Any], y: Any, sample_weight: Any = None) -> "Batch":
        """From the preprocessor's `(x, y, sample_weight)`: arrays or tensors. Raises InputError for other keys or
        shapes.
        """
        missing = sorted({"encoder_token_ids", "decoder_token_ids"} - set(x))
        if missing:
            raise InputError(
                f"preprocessed x must hold encoder_token_ids and decoder_token_ids. Received: {', '.join(map(str, x))}"
            )
        inputs = {}
        for side in ("encoder", "decoder"):
            ids = torch.as_tensor(x[f"{side}_token_ids"]).long()
            mask = x.get(f"{side}_padding_mask")
            inputs[f"{side}_token_ids"] = ids
            inputs[f"{side}_padding_mask"] = (
                torch.ones_like(ids).bool() if mask is None else torch.as_tensor(mask).bool()
            )
        labels = torch.as_tensor(y).long()
        mask = inputs["decoder_padding_mask"]
        weights = mask.float() if sample_weight is None else torch.as_tensor(sample_weight).float()
        if weights.ndim == 1:  # one weight per row, as Keras allows
            weights = weights[:, None] * mask
        if labels.shape != inputs["decoder_token_ids"].shape or weights.shape != labels.shape:
            raise InputError(
                f"decoder_token_ids, y and sample_weight must have one shape [B, T]. Received: "
                f"{tuple(inputs['decoder_token_ids'].shape)}, {tuple(labels.shape)} and {tuple(weights.shape)}"
            )
        real = int(inputs["encoder_padding_mask"].sum()) + int(mask.sum())
        padded = inputs["encoder_token_ids"].numel() + mask.numel()
        return cls(inputs, labels, weights, real, padded, float(weights.sum(dtype=torch.float64)))

    def __len__(self) -> int:
        return len(self.inputs["encoder_token_ids"])

    @property
    def padded_targets(self) -> int:
        """B x T."""
        return self.labels.numel() if self.packing is None else len(self) * self.packing.target.width

    def share(self, rank: int, size: int) -> "Batch":
        """Rows rank, rank + size, ... for one of `size` workers; a row of padding without weight where there is none.

        Not for a packed batch.
        """
        if size == 1:
            return self
        share, rows = Batch.empty(0), slice(rank, None, size)
        if rank < len(self):
            inputs = {name: value[rows] for name, value in self.inputs.items()}
            share = Batch.from_arrays(inputs, self.labels[rows], self.weights[rows])
        return replace(share, whole=self)

    def packed(self) -> "Batch":
        """The same rows without padding: `decoder_token_ids`, labels and weights of all rows one after another, `[T]`.

        Only the source ids keep their padding, for the embedding alone. Targets end where their last weight is: what
        follows has no part in the loss. The batch itself where a source has padding between tokens, or no token.
        """
        source = self.inputs["encoder_padding_mask"]
        if self.packing is not None or not bool(source[:, 0].all() and (source[:, 1:] <= source[:, :-1]).all()):
            return self
        target = (self.weights != 0).flip(1).cumsum(1).flip(1) > 0
        target[:, 0] = True
        packing = Packing(PackedRows.of(source), PackedRows.of(target))
        target_ids, labels, weights = (
            packing.target.pack(x) for x in (self.inputs["decoder_token_ids"], self.labels, self.weights)
        )
        inputs = {name: self.inputs[name] for name in ("encoder_token_ids", "encoder_padding_mask")}
        inputs["decoder_token_ids"] = target_ids
        return replace(self, inputs=inputs, labels=labels, weights=weights, packing=packing)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Batch":
        """A copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> "Batch":
        """A copy in page-locked memory, from which a copy to CUDA does not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        packing = None if self.packing is None else self.packing.map(move)
        return replace(self, inputs=inputs, labels=move(self.labels), weights=move(self.weights), packing=packing)


class Ragged:
    """Rows of ids of unequal length in one flat int32 array (4 bytes a token)."""

    def __init__(self, flat: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        self.flat = flat
        self.lengths = lengths
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """A copy of the rows."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(lengths.sum())), lengths)

    @classmethod
    def from_arrays(cls, rows: Sequence[NDArray[np.int32]]) -> "Ragged":
        """A copy of the rows, each an int32 array."""
        empty = np.empty(0, np.int32)
        return cls(np.concatenate([empty, *rows]), np.array([len(row) for row in rows], dtype=np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """All parts' rows in order; no part is an empty Ragged."""
        empty = np.empty(0, np.int32), np.empty(0, np.int64)
        flat = np.concatenate([empty[0], *(part.flat for part in parts)])
        return cls(flat, np.concatenate([empty[1], *(part.lengths for part in parts)]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    def slice(self, start: int, stop: int) -> "Ragged":
        """Rows `start` to `stop`, sharing the memory."""
        return Ragged(self.flat[self.starts[start] : self.starts[stop]], self.lengths[start:stop])

    def pad(self, rows: Sequence[int] | NDArray[np.int64], width: int, value: int) -> NDArray[np.int64]:
        """The rows as int64 `[len(rows), width]`, filled up with `value`."""
        padded = np.full((len(rows), width), value, dtype=np.int64)
        if len(rows):
            inside = np.arange(width) < self.lengths[np.asarray(rows)][:, None]
            padded[inside] = np.concatenate([self[row] for row in rows])
        return padded


class RaggedParts(Ragged):
    """Several Ragged one after another without a copy, such as files that are mapped into memory. Not sliceable."""

    def __init__(self, parts: Sequence[Ragged]) -> None:
        self.parts = parts
        self.lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
        self.first = np.cumsum([0, *(len(part) for part in parts)])

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        return self.parts[part][row - self.first[part]]


@dataclass(slots=True)
class Examples:
    """Source and label ids with the special tokens, one pair a row.

    `start` is the id the decoder starts from, one for all rows or int32 `[rows]`, and `pad` the padding id; `widths`
    (S, T) pads every batch to one size.
    """

    sources: Ragged
    labels: Ragged
    start: int | NDArray[np.int32]
    pad: int
    widths: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def slice(self, start: int, stop: int) -> "Examples":
        """Rows `start` to `stop`."""
        starts = self.start if isinstance(self.start, int) else self.start[start:stop]
        return Examples(self.sources.slice(start, stop), self.labels.slice(start, stop), starts, self.pad, self.widths)

    def collate(self, rows: Sequence[int] | NDArray[np.int64], multiple: int = 1) -> Batch:
        """The rows as a padded batch; widths are rounded up to a multiple of `multiple`.

        Decoder inputs are the labels moved right behind the start token, as transformers' `shift_tokens_right`.
        """
        s, t = self.sources.lengths[rows], self.labels.lengths[rows]
        width_s, width_t = self.widths or tuple(-(-int(lengths.max()) // multiple) * multiple for lengths in (s, t))
        labels = self.labels.pad(rows, width_t, self.pad)
        starts = np.broadcast_to(self.start if isinstance(self.start, int) else self.start[rows], len(rows))
        decoder = np.concatenate([starts[:, None].astype(np.int64), labels[:, :-1]], axis=1)
        mask = np.arange(width_t) < t[:, None]
        inputs = {
            "encoder_token_ids": torch.from_numpy(self.sources.pad(rows, width_s, self.pad)),
            "encoder_padding_mask": torch.from_numpy(np.arange(width_s) < s[:, None]),
            "decoder_token_ids": torch.from_numpy(decoder),
            "decoder_padding_mask": torch.from_numpy(mask),
        }
        weights = torch.from_numpy(mask.astype(np.float32))
        padded = len(rows) * (width_s + width_t)
        return Batch(inputs, torch.from_numpy(labels), weights, int(s.sum() + t.sum()), padded, float(t.sum()))


@dataclass(frozen=True, slots=True)
class Mixture:
    """Several inputs of `sizes` rows, one after another, seen in proportion to `weights`.

    An epoch has as many rows as all inputs together. Each input goes round in an order that is new every time, so all
    of its rows are seen equally often, and with weights in proportion to the sizes each once an epoch.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.sizes) or not all(0 < w < float("inf") for w in self.weights):
            raise SettingsError(
                f"the inputs' weights must be {len(self.sizes)} numbers above 0, one an input. Received: {self.weights}"
            )

    @classmethod
    def tempered(cls, sizes: Sequence[int], temperature: float) -> "Mixture":
        """Weights size ** (1 / temperature): 1 is in proportion to the sizes, large values level them (Arivazhagan
        et al. 2019, arXiv:1907.05019).
        """
        return cls(tuple(sizes), tuple(max(size, 1) ** (1 / temperature) for size in sizes))

    def counts(self) -> list[int]:
        """Rows of each input in an epoch; they sum to all rows."""
        edges = np.cumsum([0.0, *self.weights]) / sum(self.weights) * sum(self.sizes)
        return [int(n) if size else 0 for n, size in zip(np.diff(np.round(edges)), self.sizes, strict=True)]

    def rows(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch, input after input."""
        parts, first = [np.empty(0, np.int64)], 0
        for index, (size, count) in enumerate(zip(self.sizes, self.counts(), strict=True)):
            place, stop = epoch * count, (epoch + 1) * count
            while place < stop:
                turn, start = divmod(place, size)
                order = np.random.default_rng([seed, index, turn]).permutation(size)
                parts.append(first + order[start : start + stop - place])
                place += len(parts[-1])
            first += size
        return np.concatenate(parts)


@dataclass(slots=True)
class BatchPlan:
    """Which rows make up each batch of each epoch; a function of (seed, epoch) and the lengths alone.

    With `batch_tokens`, rows are shuffled, sorted within windows of about `window_batches` batches (by source to within
    a few tokens, then by target), and cut so that no batch exceeds `batch_tokens` padded tokens (source and target
    together); the batches of a window are shuffled again. Without it, batches have `batch_size` rows in shuffled order
    (in order with `shuffle=False`), as Keras. A row longer than `batch_tokens` is a batch of its own. `state_dict` and
    `load_state_dict` keep the place in an epoch.
    """

    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    batch_size: int = 32
    batch_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    multiple: int = 1
    window_batches: int = 200
    epoch: int = 0
    position: int = 0
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "multiple", "window_batches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} must be a whole number of at least 1. Received: {value!r}")

    def batches(self) -> list[NDArray[np.int64]]:
        """All batches of the current epoch, as row numbers."""
        generator = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.sources)) if self.mixture is None else self.mixture.rows(self.seed, self.epoch)
        if self.shuffle:
            order = generator.permutation(order)
        if self.batch_tokens is None:
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        mean = float((self.sources + self.targets).mean()) if len(order) else 1.0
        window = max(1, round(self.window_batches * self.batch_tokens / max(mean, 1.0)))
        batches: list[NDArray[np.int64]] = []
        for start in range(0, len(order), window):
            cut = self._cut(order[start : start + window])
            batches += [cut[i] for i in generator.permutation(len(cut))] if self.shuffle else cut
        return batches

    def _cut(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        assert self.batch_tokens is not None
        strips, targets = self.sources[rows] // _STRIP_TOKENS, self.targets[rows]
        # Up and down in turn, so that targets are alike on both sides of where one strip meets the next.
        rows = rows[np.lexsort((np.where(strips % 2, -targets, targets), strips))]
        cut, start, longest_s, longest_t = [], 0, 0, 0
        for index, (s, t) in enumerate(
            zip(self._round(self.sources[rows]), self._round(self.targets[rows]), strict=True)
        ):
            longest_s, longest_t = max(longest_s, int(s)), max(longest_t, int(t))
            if (index + 1 - start) * (longest_s + longest_t) > self.batch_tokens and index > start:
                cut.append(rows[start:index])
                start, longest_s, longest_t = index, int(s), int(t)
        return [*cut, rows[start:]] if len(rows) else cut

    def _round(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The rest of the current epoch, from `position`; afterwards the plan stands at the start of the next epoch."""
        for rows in self.batches()[self.position :]:
            self.position += 1
            yield rows
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The place: epoch and number of batches already given out."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a place that `state_dict` gave. Raises SettingsError when it was made with another seed."""
        if state["seed"] != self.seed:
            raise SettingsError(f"the saved place belongs to seed {state['seed']}, this plan has seed {self.seed}")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
