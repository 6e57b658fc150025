"""Position embeddings and relative position biases. The caller gives positions; no layer counts them.

Dimensions: H heads.
"""

import math

import torch
from torch import Tensor, nn


class LearnedPositions(nn.Embedding):
    """A learned table whose first `offset` rows are not positions (BART keeps two for its padding index)."""

    def __init__(self, num_positions: int, hidden_dim: int, *, offset: int = 0) -> None:
        super().__init__(num_positions + offset, hidden_dim)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 `[...]`, from 0, to `[..., D]`."""
        return super().forward(positions + self.offset)


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
        bias = self._of(offsets)
        if self.causal:
            bias = bias.masked_fill(offsets > 0, float("-inf"))
        return bias.unfold(1, length, 1).flip(1)[None]  # row q is the window that begins at offset -q

    def table(self) -> Tensor:
        """The bias on the key that lies 0, 1, ... `max_distance` before the query, `[H, max_distance + 1]`; the last
        one holds for all that are farther.
        """
        return self._of(-torch.arange(self.max_distance + 1, device=self.weight.device))

    def _of(self, offsets: Tensor) -> Tensor:
        return super().forward(self._bucket(offsets)).T  # key minus query [L] -> [H, L]

    def _bucket(self, offsets: Tensor) -> Tensor:
        count = self.num_embeddings if self.causal else self.num_embeddings // 2
        distance = offsets.abs()
        exact = count // 2
        log = torch.log(distance.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (log * (count - exact)).long()).clamp(max=count - 1)
        bucket = torch.where(distance < exact, distance, far)
        return bucket if self.causal else bucket + count * (offsets > 0)
