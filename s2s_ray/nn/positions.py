"""Position embeddings and relative position biases. The caller gives positions; no layer counts them.

Dimensions: D model, H heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LearnedPositions(nn.Embedding):
    """A learned table whose first `offset` rows are not positions (BART keeps two for its padding index)."""

    def __init__(self, num_positions: int, hidden_dim: int, *, offset: int = 0) -> None:
        super().__init__(num_positions + offset, hidden_dim)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 `[...]`, from 0, to `[..., D]`."""
        return super().forward(positions + self.offset)


class SinusoidalPositions(nn.Module):
    """Marian's table: row p holds sin(p / 10000 ** (2i / D)) in its first half and the cosines in its second.

    The table is part of the checkpoint where one holds it; `reset` computes it, in fp64, where none does.
    """

    weight: Tensor

    def __init__(self, num_positions: int, hidden_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(num_positions, hidden_dim))
        self.reset()

    def reset(self) -> None:
        """Compute the table in place; nothing on the meta device."""
        if self.weight.is_meta:
            return
        count, dim = self.weight.shape
        angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)
        cosines = angles[:, : dim // 2].cos()  # one less than sines where D is odd
        self.weight.copy_(torch.cat((angles.sin(), cosines), dim=1).float())

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 `[...]`, from 0, to `[..., D]`."""
        return F.embedding(positions, self.weight)


class UnboundedSinusoids(nn.Module):
    """fairseq's sinusoids, computed for whatever position comes: sines, then cosines, of (p + offset) * w, w falling
    geometrically from 1 to 1 / 10000; a last 0 where D is odd.
    """

    def __init__(self, hidden_dim: int, *, offset: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 `[...]`, from 0, to fp32 `[..., D]`."""
        half = self.hidden_dim // 2
        steps = torch.arange(half, device=positions.device).float()
        frequencies = torch.exp(steps * -(math.log(10000) / max(half - 1, 1)))
        angles = (positions + self.offset).float()[..., None] * frequencies
        return F.pad(torch.cat((angles.sin(), angles.cos()), dim=-1), (0, self.hidden_dim % 2))


class RelativeBias(nn.Embedding):
    """What T5 adds to attention scores: a learned number for each head and bucket of distances (arXiv:1910.10683).

    Half of a direction's buckets are single distances; the others widen logarithmically up to `max_distance`, and
    everything farther shares the last. `causal` knows keys before the query alone; otherwise each direction has half
    of the buckets.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, *, causal: bool) -> None:
        super().__init__(num_buckets, num_heads)
        self.max_distance = max_distance
        self.causal = causal

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        """The bias of every query (rows) on every key of a sequence, `[1, H, length, length]`; -inf on keys that a
        causal query may not see.
        """
        offsets = torch.arange(1 - length, length, device=self.weight.device)
        bias = self.of(offsets)
        if self.causal:
            bias = bias.masked_fill(offsets > 0, float("-inf"))
        return bias.unfold(1, length, 1).flip(1)[None]  # row q is the window that begins at offset -q

    def table(self) -> Tensor:
        """The bias on the key that lies 0, 1, ... `max_distance` before the query, `[H, max_distance + 1]`; where the
        query sees both ways, on the key that lies -max_distance ... max_distance on, `[H, 2 max_distance + 1]`. The
        ends hold for all that are farther.
        """
        farthest = self.max_distance
        offsets = torch.arange(-farthest, 1 if self.causal else farthest + 1, device=self.weight.device)
        return self.of(offsets.flip(0) if self.causal else offsets)

    def of(self, offsets: Tensor) -> Tensor:
        """Key minus query, int64 `[L]`, to what is added, `[H, L]`."""
        return super().forward(self._bucket(offsets)).T

    def _bucket(self, offsets: Tensor) -> Tensor:
        count = self.num_embeddings if self.causal else self.num_embeddings // 2
        distance = offsets.abs()
        exact = count // 2
        log = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (log * (count - exact)).long()).clamp(max=count - 1)
        bucket = torch.where(distance < exact, distance, far)
        return bucket if self.causal else bucket + count * (offsets > 0)
