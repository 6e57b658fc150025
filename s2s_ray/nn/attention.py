"""Multi-head attention: one module for encoder, decoder and cross-attention.

Dimensions: B rows, S source, T target or query length, N rows x beams, H heads, K head size, D model, I = H x K
(D in most families, not in T5).
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.nn.linear import Projection, pack_linear
from s2s_ray.nn.packing import PackedAttention
from s2s_ray.nn.positions import RelativeBias
from s2s_ray.nn.ragged import RaggedRows


class Attention(nn.Module):
    """Scaled dot-product attention with separate query, key, value and output projections.

    `forward` is the whole-sequence path of training and encoding. Generation uses `project`, `project_memory` and
    `output` around a cache that does the attention itself, on the packed weights that `pack` makes.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        relative_bias: RelativeBias | None = None,
    ) -> None:
        """head_dim: default D / H; scale: of the scores, default head_dim ** -0.5. relative_bias is only held here: the
        stack that owns this layer adds it to the mask, since layers may share it.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim or hidden_dim // num_heads
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.dropout = dropout
        inner_dim = num_heads * self.head_dim
        self.query = nn.Linear(hidden_dim, inner_dim, bias=bias)
        self.key = nn.Linear(hidden_dim, inner_dim, bias=bias)
        self.value = nn.Linear(hidden_dim, inner_dim, bias=bias)
        self.out = nn.Linear(inner_dim, hidden_dim, bias=bias)
        self.relative_bias = relative_bias
        self._packed: dict[str, Projection] = {}

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | RaggedRows | PackedAttention | None = None,
        causal: bool = False,
    ) -> Tensor:
        """x `[B, T, D]`, memory `[B, S, D]` (None: x itself), mask `[B or 1, 1 or H, 1 or T, S]`: bool,
        True to attend, or what is added to the scores. Rows without padding: x `[T, D]`, memory `[S, D]`; mask says
        where they are.
        """
        if isinstance(mask, RaggedRows):
            return self.output(mask.attend(self._packed["qkv"](x), heads=self.num_heads, scale=self.scale))
        if isinstance(mask, PackedAttention):
            query, key, value = self._project_jointly(x, memory)
            dropout = self.dropout if self.training else 0.0
            return self.output(mask(query, key, value, heads=self.num_heads, scale=self.scale, dropout=dropout))
        query, key, value = self._project_all(x, memory)
        heads = F.scaled_dot_product_attention(
            self._split(query),
            self._split(key),
            self._split(value),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
        )
        return self.output(heads.transpose(1, 2).flatten(2))

    def _project_all(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None and "qkv" in self._packed:
            query, key, value = self.project(x)
            return query, key, value
        source = x if memory is None else memory
        return self.query(x), self.key(source), self.value(source)

    def _project_jointly(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """As `_project_all`, by one product for all layers that read the same input."""
        layers = (self.query, self.key, self.value)
        if self._packed or any(type(layer) is not nn.Linear for layer in layers):
            return self._project_all(x, memory)
        if memory is None:
            query, key, value = _joint(x, *layers).chunk(3, dim=-1)
            return query, key, value
        key, value = _joint(memory, self.key, self.value).chunk(2, dim=-1)
        return self.query(x), key, value

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, T, I] -> [B, H, T, K]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[..., D]` to its query, key and value, each `[..., I]`."""
        if "qkv" in self._packed:
            query, key, value = self._packed["qkv"](x).chunk(3, dim=-1)
            return query, key, value
        return self.query(x), self.key(x), self.value(x)

    def project_query(self, x: Tensor) -> Tensor:
        """x `[..., D]` to its query `[..., I]`."""
        return self._packed.get("query", self.query)(x)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory `[B, S, D]` to cross-attention keys and values, each `[B, S, I]`."""
        if "kv" in self._packed:
            key, value = self._packed["kv"](memory).chunk(2, dim=-1)
            return key, value
        return self.key(memory), self.value(memory)

    def output(self, x: Tensor) -> Tensor:
        """The joined heads `[..., I]` through the output projection, `[..., D]`."""
        return self._packed.get("out", self.out)(x)

    def pack(self, quantization: str | None = None, *, cross: bool = False) -> None:
        """Pack the projections for generation; `cross` says which of the two sets this module uses."""
        pack = functools.partial(pack_linear, quantization=quantization)
        if cross:
            self._packed = {"query": pack(self.query), "kv": pack(self.key, self.value)}
        else:
            self._packed = {"qkv": pack(self.query, self.key, self.value)}
        self._packed["out"] = pack(self.out)

    def unpack(self) -> None:
        """Forget the packed weights."""
        self._packed = {}


def _joint(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The outputs of all layers side by side."""
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    return F.linear(x, torch.cat(tuple(layer.weight for layer in layers)), torch.cat(biases) if biases else None)
