"""Rows of different lengths one after another, without padding, in training: where they lie, attention between them.

nn/ragged.py is the counterpart for encoding without gradients, on kernels of our own.
Dimensions: R rows, L their width when padded, T tokens of all rows together, H heads, K head size, I = H x K.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LARGEST_HEAD = 256  # of flash attention


@dataclass(frozen=True)
class PackedRows:
    """Where each row lies: `starts` int32 `[R + 1]`; `index` int64 `[T]`, each token's place in `[R, L]`, flattened."""

    starts: Tensor
    index: Tensor
    width: int

    @classmethod
    def of(cls, mask: Tensor) -> "PackedRows":
        """mask bool `[R, L]`: True for a row's tokens, which stand first."""
        starts = torch.zeros(len(mask) + 1, dtype=torch.int32)
        starts[1:] = mask.sum(1).cumsum(0)
        return cls(starts, mask.flatten().nonzero().squeeze(1), mask.shape[1])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def positions(self) -> Tensor:
        """Each token's place in its row, from 0; int64 `[T]`."""
        return self.index % self.width

    def padding_mask(self) -> Tensor:
        """bool `[R, L]`, True for tokens."""
        places = torch.arange(self.width, device=self.starts.device)
        return places < self.starts.diff()[:, None]

    def pack(self, x: Tensor) -> Tensor:
        """`[R, L, ...]` to `[T, ...]`."""
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[R, L, ...]`, zeros for padding."""
        padded = x.new_zeros(len(self) * self.width, *x.shape[1:]).index_copy(0, self.index, x)
        return padded.unflatten(0, (len(self), self.width))

    def map(self, move: Callable[[Tensor], Tensor]) -> "PackedRows":
        """A copy whose tensors `move` made."""
        return PackedRows(move(self.starts), move(self.index), self.width)


@dataclass(frozen=True)
class Packing:
    """Where the sources and the targets of a batch lie."""

    source: PackedRows
    target: PackedRows

    def map(self, move: Callable[[Tensor], Tensor]) -> "Packing":
        """A copy whose tensors `move` made."""
        return Packing(self.source.map(move), self.target.map(move))


@dataclass(frozen=True)
class PackedAttention:
    """Each row's queries on the same row's keys. `bias` `[1, H, L, L]` is added to the scores; a causal one masks by
    itself.
    """

    queries: PackedRows
    keys: PackedRows
    causal: bool = False
    bias: Tensor | None = None

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, heads: int, scale: float, dropout: float
    ) -> Tensor:
        """query `[T, I]`, key and value `[T', I]` to `[T, I]`.

        Flash attention where it can be had; elsewhere only the attention itself is padded.
        """
        query, key, value = (x.unflatten(-1, (heads, -1)) for x in (query, key, value))  # [T, H, K]
        attend = self._flash if self._takes_flash(query) else self._padded
        return attend(query, key, value, scale, dropout).flatten(1)

    def _takes_flash(self, query: Tensor) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        size = query.shape[-1]
        return query.is_cuda and half and self.bias is None and size % 8 == 0 and size <= _LARGEST_HEAD

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
        # What scaled_dot_product_attention calls for nested tensors; torch's own varlen_attn has no dropout.
        result: Tensor = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            self.queries.starts,
            self.keys.starts,
            self.queries.width,
            self.keys.width,
            dropout,
            self.causal,
            False,
            scale=scale,
        )[0]
        return result

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
        query, key, value = (
            rows.pad(x).transpose(1, 2) for rows, x in ((self.queries, query), (self.keys, key), (self.keys, value))
        )
        mask = self.bias
        if not self.causal:  # a causal query sees no key behind itself, and so no padding
            real = self.keys.padding_mask()[:, None, None]
            mask = real if mask is None else mask.masked_fill(~real, float("-inf"))
        heads = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=self.causal and mask is None, scale=scale
        )
        return self.queries.pack(heads.transpose(1, 2))
