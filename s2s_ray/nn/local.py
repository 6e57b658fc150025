"""Self-attention of long sources: each token to those near it, and to sums of blocks of the whole source (LongT5).

Nothing here is of source length squared. Rows are cut into blocks of `size` tokens, and the queries of a block meet the
keys of their own and of the two beside it.

Dimensions: B rows, S source, C blocks of a row, L tokens of a block, G sums of a row, H heads, K head size, D model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.nn.attention import Attention
from s2s_ray.nn.positions import RelativeBias


class SourceBlocks:
    """What all layers of a stack share: the bias of every query on the keys it meets.

    padding_mask bool `[B, S]`, True for tokens, which stand before the padding. A query sees keys less than `size`
    tokens away, with `bias`; with `sum_size`, also the sums of that many tokens, with `sum_bias` by their distance in
    sums. What does not make a whole sum belongs to the one before it.
    """

    def __init__(
        self,
        padding_mask: Tensor,
        size: int,
        bias: RelativeBias,
        sum_size: int = 0,
        sum_bias: RelativeBias | None = None,
    ) -> None:
        self.size, self.length = size, padding_mask.shape[1]
        self._members: Tensor | None = None
        offsets = torch.arange(1 - 2 * size, 2 * size, device=padding_mask.device)
        near = bias.of(offsets).masked_fill(offsets.abs() >= size, self._never(bias))
        near = near.unfold(1, 3 * size, 1)[:, :size].flip(1)  # [H, L, 3 L]: query q's window begins at offset -L - q
        real = self.neighbours(padding_mask[..., None, None])[:, :, None, None, :, 0, 0]  # [B, C, 1, 1, 3 L]
        self.bias = near.where(real, self._never(bias))
        if sum_bias is not None:
            self.bias = torch.cat((self.bias, self._sum_bias(padding_mask, sum_size, sum_bias)), dim=-1)

    @staticmethod
    def _never(bias: RelativeBias) -> float:
        # Not -inf: padding may see nothing at all, and its NaN would reach the real tokens through their values.
        return float(torch.finfo(bias.weight.dtype).min)

    def _sum_bias(self, padding_mask: Tensor, size: int, bias: RelativeBias) -> Tensor:
        """`[B, C, H, L, G]`; and which sum each token belongs to."""
        count = self.length // size
        whole = padding_mask.sum(dim=1, keepdim=True) // size  # [B, 1]
        sums = torch.arange(count, device=padding_mask.device)
        own = (torch.arange(self.length, device=padding_mask.device) // size).minimum(whole - 1)  # [B, S]
        self._members = (own[..., None] == sums) & padding_mask[..., None]
        table = bias.of(torch.arange(-count, count + 1, device=padding_mask.device))  # [H, 2 G + 1]
        values = table[:, (sums - own[..., None] + count).clamp(0, 2 * count)]  # [H, B, S, G]
        values = values.where((sums < whole)[:, None], self._never(bias))
        return self.blocks(values.permute(1, 2, 0, 3)).transpose(2, 3)

    def blocks(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` to `[B, C, L, ...]`, filled up with zeros."""
        missing = -self.length % self.size
        padded = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        return padded.unflatten(1, (-1, self.size))

    def neighbours(self, x: Tensor) -> Tensor:
        """`[B, S, H, K]` to the tokens that each block meets, `[B, C, 3 L, H, K]`."""
        blocks = F.pad(self.blocks(x), (0, 0) * (x.ndim - 1) + (1, 1))
        return torch.cat((blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]), dim=2)

    def sums(self, x: Tensor) -> Tensor:
        """x `[B, S, D]` to the sums over its blocks, `[B, G, D]`."""
        assert self._members is not None
        return self._members.to(x.dtype).transpose(1, 2) @ x


class LocalAttention(Attention):
    """Attention over `SourceBlocks`; with `sum_norm`, keys and values of the normed sums come through the same
    projections. `sum_bias` is only held here, as `relative_bias` is.
    """

    def __init__(
        self,
        like: Attention,
        hidden_dim: int,
        *,
        sum_norm: nn.Module | None = None,
        sum_bias: RelativeBias | None = None,
    ) -> None:
        """As `like`, an attention of width `hidden_dim` without biases."""
        super().__init__(
            hidden_dim,
            like.num_heads,
            head_dim=like.head_dim,
            scale=like.scale,
            dropout=like.dropout,
            bias=False,
            relative_bias=like.relative_bias,
        )
        self.sum_norm = sum_norm
        self.sum_bias = sum_bias

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: None = None, *, mask: SourceBlocks, causal: bool = False
    ) -> Tensor:
        """x `[B, S, D]` to `[B, S, D]`; what padding becomes is of no use."""
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.project(x))
        keys, values = mask.neighbours(key), mask.neighbours(value)
        if self.sum_norm is not None:
            _, *sums = self.project(self.sum_norm(mask.sums(x)))
            parts = [
                part.unflatten(-1, (self.num_heads, -1))[:, None].expand(-1, keys.shape[1], -1, -1, -1) for part in sums
            ]
            keys, values = torch.cat((keys, parts[0]), dim=2), torch.cat((values, parts[1]), dim=2)
        query, keys, values = (part.transpose(2, 3) for part in (mask.blocks(query), keys, values))  # [B, C, H, ..., K]
        dropout = self.dropout if self.training else 0.0
        bias = mask.bias.to(query.dtype)
        heads = F.scaled_dot_product_attention(query, keys, values, bias, dropout_p=dropout, scale=self.scale)
        return self.output(heads.transpose(2, 3).flatten(1, 2)[:, : x.shape[1]].flatten(2))
