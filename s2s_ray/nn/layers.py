"""One encoder layer and one decoder layer, with the norm before or after each block.

Dimensions: B rows, S source, T target, N rows x beams, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.nn.attention import Attention
from s2s_ray.nn.feedforward import FeedForward

if TYPE_CHECKING:
    from s2s_ray.generation.cache import DecoderCache


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What a layer is made of. Dropouts are probabilities; `pre_norm` puts the norm before each block."""

    hidden_dim: int
    num_heads: int
    intermediate_dim: int
    activation: str
    pre_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    def attention(self) -> Attention:
        """A new attention module of this shape."""
        return Attention(self.hidden_dim, self.num_heads, dropout=self.attention_dropout)

    def feedforward(self) -> FeedForward:
        """A new feed-forward module of this shape."""
        return FeedForward(self.hidden_dim, self.intermediate_dim, self.activation, dropout=self.activation_dropout)

    def norm(self) -> nn.LayerNorm:
        """A new layer norm of this width."""
        return nn.LayerNorm(self.hidden_dim)


class _Layer(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.pre_norm = shape.pre_norm
        self.dropout = shape.dropout

    def _residual(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + F.dropout(block(norm(x)), self.dropout, self.training)
        return norm(x + F.dropout(block(x), self.dropout, self.training))


def clamp_overflow(x: Tensor) -> Tensor:
    """Bring fp16 infinities back into range, as transformers does after each BART-like encoder layer."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)


class EncoderLayer(_Layer):
    """Self-attention, then feed-forward."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.self_attention = shape.attention()
        self.self_attention_norm = shape.norm()
        self.feedforward = shape.feedforward()
        self.feedforward_norm = shape.norm()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x `[B, S, D]`, mask bool `[B, 1, 1, S]` or None."""
        x = self._residual(x, self.self_attention_norm, lambda h: self.self_attention(h, mask=mask))
        return clamp_overflow(self._residual(x, self.feedforward_norm, self.feedforward))

    def pack(self) -> None:
        """Pack the weights for generation."""
        self.self_attention.pack(cross=False)
        self.feedforward.pack()


class DecoderLayer(_Layer):
    """Self-attention, cross-attention, then feed-forward."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.self_attention = shape.attention()
        self.self_attention_norm = shape.norm()
        self.cross_attention = shape.attention()
        self.cross_attention_norm = shape.norm()
        self.feedforward = shape.feedforward()
        self.feedforward_norm = shape.norm()

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Whole target sequences: x `[B, T, D]`, memory `[B, S, D]`, memory_mask bool `[B, 1, 1, S]` or None."""
        x = self._residual(x, self.self_attention_norm, lambda h: self.self_attention(h, causal=True))
        x = self._residual(x, self.cross_attention_norm, lambda h: self.cross_attention(h, memory, mask=memory_mask))
        return self._residual(x, self.feedforward_norm, self.feedforward)

    def step(self, x: Tensor, cache: "DecoderCache", index: int) -> Tensor:
        """One new token of every live sequence: x `[N, D]`; the cache holds all earlier ones and the memory."""

        def attend_self(h: Tensor) -> Tensor:
            return self.self_attention.output(cache.attend_self(index, *self.self_attention.project(h)))

        def attend_cross(h: Tensor) -> Tensor:
            return self.cross_attention.output(cache.attend_cross(index, self.cross_attention.project_query(h)))

        x = self._residual(x, self.self_attention_norm, attend_self)
        x = self._residual(x, self.cross_attention_norm, attend_cross)
        return self._residual(x, self.feedforward_norm, self.feedforward)

    def pack(self) -> None:
        """Pack the weights for generation."""
        self.self_attention.pack(cross=False)
        self.cross_attention.pack(cross=True)
        self.feedforward.pack()
