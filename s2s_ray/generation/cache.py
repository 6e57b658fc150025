"""Keys and values of the rows being decoded.

A cohort is a set of rows admitted together: one encoder batch, one tight cross-attention cache, one age. The cache of a
step is a list of cohorts: every linear layer of the decoder runs over all of their sequences at once, attention runs
cohort by cohort, so no row attends over another's padding or age.

The beams of a row share its cross-attention keys and values. Their self-attention keys and values are written once,
where they were computed, and never moved: which of them a beam's history consists of is a table of places, so `reorder`
is a gather over small integers.

Dimensions: R rows of a cohort, W width (beams or parallel samples of a row), N sum of R x W, H heads, K head size,
S source length, T positions decoded so far, D the model's width, P of a position table.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from s2s_ray.kernels import cpu

_GROWTH = 32  # positions; the self-attention buffers double from here


class Cohort:
    """Cross- and self-attention caches of rows of one age. Raises nothing by itself; memory errors are torch's."""

    def __init__(
        self,
        cross: Sequence[tuple[Tensor, Tensor]],
        padding_mask: Tensor | None,
        *,
        width: int,
        num_heads: int,
        scale: float,
        position_tables: Tensor | None = None,
    ) -> None:
        """cross: per layer key and value `[R, S, D]`; padding_mask bool `[R, S]`, True for tokens, which stand first,
        None without padding; position_tables `[1 or layers, H, P]`: see `Backbone.position_tables`.
        """
        self.width = width
        self.num_heads = num_heads
        self.scale = scale
        self.num_rows = cross[0][0].shape[0]
        self.cross = [(self._heads(key), self._heads(value)) for key, value in cross]
        self.source_length = cross[0][0].shape[1]
        first = cross[0][0]
        self.native = first.device.type == "cpu" and first.dtype == torch.float32 and cpu.library() is not None
        self.cross_bias: Tensor | None = None
        if self.native:
            lengths = torch.full((self.num_rows,), first.shape[1]) if padding_mask is None else padding_mask.sum(dim=1)
            self._lengths = lengths.to(torch.int32)
            self._cross_parts = self._parts_of_cross()
        elif padding_mask is not None:
            bias = torch.zeros(padding_mask.shape, dtype=first.dtype, device=first.device)
            bias.masked_fill_(~padding_mask, float("-inf"))
            # Repeated for each head, since a batched product adds only a bias of its own shape.
            self.cross_bias = bias.repeat_interleave(num_heads, dim=0)[:, None]
        self.age = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._self_parts: list[cpu.Part] = []
        self._places: Tensor | None = None  # int32 [R, W, T]: which sequence of its row wrote each position's entry
        self._tables = position_tables
        self._self_bias: Tensor | None = None  # [1 or layers, R x H, W, T x W]

    @property
    def num_sequences(self) -> int:
        """R x W."""
        return self.num_rows * self.width

    def _heads(self, x: Tensor) -> Tensor:
        # [R, S, D] -> [R x H, S, K]
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def begin_step(self) -> None:
        """Make room for one more position and fix which cached positions each sequence may see."""
        capacity = self._keys[0].shape[1] // self.width if self._keys else 0
        if self.age == capacity:
            self._grow(max(_GROWTH, 2 * capacity))
        if self.width > 1:
            own = torch.arange(self.width, dtype=torch.int32, device=self.cross[0][0].device)
            own = own[:, None].expand(self.num_rows, -1, 1)
            self._places = torch.cat([own] if self._places is None else [self._places, own], dim=-1)
        if not self.native:
            biases = [bias for bias in (self._position_bias(), self._ancestry_bias()) if bias is not None]
            self._self_bias = sum(biases[1:], biases[0]) if biases else None

    def _position_bias(self) -> Tensor | None:
        if self._tables is None:
            return None
        distances = torch.arange(self.age, -1, -1, device=self._tables.device).clamp(max=self._tables.shape[-1] - 1)
        bias = self._tables[:, :, distances].repeat_interleave(self.width, dim=-1)
        return bias[:, None, :, None].expand(-1, self.num_rows, -1, self.width, -1).flatten(1, 2)

    def _ancestry_bias(self) -> Tensor | None:
        if self._places is None:
            return None
        reference = self.cross[0][0]
        bias = reference.new_full((*self._places.shape, self.width), float("-inf"))
        bias.scatter_(-1, self._places[..., None].long(), 0.0)
        return bias.flatten(2).repeat_interleave(self.num_heads, dim=0)[None]

    def _grow(self, capacity: int) -> None:
        reference = self.cross[0][0]
        shape = (reference.shape[0], capacity * self.width, reference.shape[-1])
        used = self.age * self.width
        for buffers in (self._keys, self._values):
            old = list(buffers)
            buffers[:] = [reference.new_empty(shape) for _ in self.cross]
            for new, previous in zip(buffers, old, strict=False):
                new[:, :used] = previous[:, :used]
        if self.native:
            self._self_parts = self._parts_of_self()

    def attend_self_in_torch(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What DecoderCache, the one door to both, does where there is no compiled attention: query, key, value
        `[R x W, D]` of the newest position to its attention output `[R x W, D]`.
        """
        start, end = self.age * self.width, (self.age + 1) * self.width
        keys, values = self._keys[layer], self._values[layer]
        keys[:, start:end] = self._split(key)
        values[:, start:end] = self._split(value)
        bias = None if self._self_bias is None else self._self_bias[layer % len(self._self_bias)]
        return self._attend(query, keys[:, :end], values[:, :end], bias)

    def attend_cross_in_torch(self, layer: int, query: Tensor) -> Tensor:
        """The same for query `[R x W, D]` over the row's source, `[R x W, D]`."""
        return self._attend(query, *self.cross[layer], self.cross_bias)

    def self_part(self, layer: int) -> cpu.Part:
        """What the compiled attention reads and writes of this layer's history."""
        part = self._self_parts[layer]
        part.age, part.places = self.age, None if self._places is None else self._places.data_ptr()
        return part

    def cross_part(self, layer: int) -> cpu.Part:
        """What the compiled attention reads of this layer's sources."""
        part = self._cross_parts[layer]
        part.width = self.width  # which speculative decoding changes from step to step
        return part

    def _parts_of_cross(self) -> list[cpu.Part]:
        rows, width, lengths = self.num_rows, self.width, self._lengths
        return [cpu.part(key, value, rows=rows, width=width, lengths=lengths) for key, value in self.cross]

    def _parts_of_self(self) -> list[cpu.Part]:
        each = zip(self._keys, self._values, strict=True)
        return [cpu.part(keys, values, rows=self.num_rows, width=self.width) for keys, values in each]

    def table(self, layer: int) -> Tensor | None:
        """The layer's relative bias, `[H, P]`."""
        return None if self._tables is None else self._tables[layer % len(self._tables)]

    def _split(self, x: Tensor) -> Tensor:
        # [R x W, D] -> [R x H, W, K], a view where W is 1
        return x.view(self.num_rows, self.width, self.num_heads, -1).transpose(1, 2).flatten(0, 1)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        scaled = self._split(query) * self.scale
        if bias is None:
            scores = torch.bmm(scaled, keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(bias, scaled, keys.transpose(1, 2))
        heads = torch.bmm(scores.softmax(dim=-1), values).view(self.num_rows, self.num_heads, self.width, -1)
        return heads.transpose(1, 2).reshape(query.shape)

    def end_step(self) -> None:
        """The position written in this step now belongs to the history."""
        self.age += 1

    def reorder(self, parents: Tensor) -> None:
        """Continue sequence w of row r from the history of sequence `parents[r, w]`; parents int64 `[R, W]`."""
        if self._places is not None:
            index = parents[:, :, None].expand(-1, -1, self._places.shape[-1])
            self._places = self._places.gather(1, index)

    def keep(self, order: list[int]) -> None:
        """Row i becomes what row `order[i]` was; rows from `len(order)` on are dropped. See `closing_order`.

        Only rows that move are copied, in place: with new buffers the same cost more than the dead rows did.
        """
        moved = [(to, row) for to, row in enumerate(order) if to != row]
        self.num_rows = len(order)
        device = self.cross[0][0].device
        targets, sources = (self._pairs([pair[side] for pair in moved], device) for side in (0, 1))
        kept = self._pairs(order, device)
        used = self.age * self.width
        self.cross = [
            (_close(key, targets, sources, kept), _close(value, targets, sources, kept)) for key, value in self.cross
        ]
        self._keys = [_close(buffer, targets, sources, kept, used) for buffer in self._keys]
        self._values = [_close(buffer, targets, sources, kept, used) for buffer in self._values]
        self.cross_bias = None if self.cross_bias is None else self.cross_bias[kept]
        rows = torch.tensor(order, dtype=torch.int64, device=device)
        self._places = None if self._places is None else self._places[rows]
        if self.native:
            self._lengths = self._lengths[rows]
            self._cross_parts, self._self_parts = self._parts_of_cross(), self._parts_of_self()

    def _pairs(self, rows: list[int], device: torch.device) -> Tensor:
        heads = torch.arange(self.num_heads)
        return (torch.tensor(rows, dtype=torch.int64)[:, None] * self.num_heads + heads).flatten().to(device)


def closing_order(live: list[bool]) -> list[int]:
    """Which row goes where so that the live ones stand first and the fewest move: the last ones fill the gaps."""
    count = sum(live)
    last = iter([row for row in range(count, len(live)) if live[row]])
    return [row if live[row] else next(last) for row in range(count)]


def _close(buffer: Tensor, targets: Tensor, sources: Tensor, kept: Tensor, used: int | None = None) -> Tensor:
    if targets.numel():
        buffer[targets, :used] = buffer[sources, :used]
    return buffer[: kept.numel()]


class StepCache(Protocol):
    """What a decoding step asks of a cache: see `DecoderCache`, its form on a CPU."""

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...

    def positions(self, device: torch.device) -> Tensor: ...

    def attend_self(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...

    def attend_cross(self, layer: int, query: Tensor) -> Tensor: ...


class DecoderCache:
    """The cohorts of one decoding step, in the order in which their sequences lie in the batch."""

    def __init__(self, cohorts: Sequence[Cohort]) -> None:
        self.cohorts = cohorts
        self._sizes = [cohort.num_sequences for cohort in cohorts]

    def begin_step(self) -> None:
        """To be called before the first layer of a step."""
        for cohort in self.cohorts:
            cohort.begin_step()

    def end_step(self) -> None:
        """To be called after the last layer of a step."""
        for cohort in self.cohorts:
            cohort.end_step()

    def positions(self, device: torch.device) -> Tensor:
        """The position of the token that each sequence now adds, int64 `[N]`, from 0."""
        ages = torch.tensor([cohort.age for cohort in self.cohorts])
        return torch.repeat_interleave(ages, torch.tensor(self._sizes)).to(device, non_blocking=True)

    def attend_self(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value `[N, D]` to the attention output `[N, D]` over each sequence's own history."""
        first = self.cohorts[0]
        if first.native:
            parts = [cohort.self_part(layer) for cohort in self.cohorts]
            table = first.table(layer)
            return cpu.attend(parts, query, key, value, heads=first.num_heads, scale=first.scale, table=table)
        each = zip(self.cohorts, *(t.split(self._sizes) for t in (query, key, value)), strict=True)
        return torch.cat([cohort.attend_self_in_torch(layer, q, k, v) for cohort, q, k, v in each])

    def attend_cross(self, layer: int, query: Tensor) -> Tensor:
        """query `[N, D]` to the attention output `[N, D]` over each row's source."""
        first = self.cohorts[0]
        if first.native:
            parts = [cohort.cross_part(layer) for cohort in self.cohorts]
            return cpu.attend(parts, query, heads=first.num_heads, scale=first.scale)
        each = zip(self.cohorts, query.split(self._sizes), strict=True)
        return torch.cat([cohort.attend_cross_in_torch(layer, q) for cohort, q in each])
