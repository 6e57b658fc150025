"""One encoder layer and one decoder layer, with the norm before or after each block.

Dimensions: B rows, S source, T target, N rows x beams, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.nn.attention import Attention
from s2s_ray.nn.feedforward import FeedForward
from s2s_ray.nn.norms import RMSNorm, add_norm, clamp_overflow
from s2s_ray.nn.packing import PackedAttention
from s2s_ray.nn.positions import RelativeBias
from s2s_ray.nn.ragged import RaggedRows

if TYPE_CHECKING:
    from s2s_ray.generation.cache import StepCache


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What a layer is made of. Dropouts are probabilities; `pre_norm` puts the norm before each block.

    head_dim and attention_scale: as in Attention. bias: of all linear layers. gated: as in FeedForward.
    """

    hidden_dim: int
    num_heads: int
    intermediate_dim: int
    activation: str
    pre_norm: bool = False
    rms_norm: bool = False
    norm_eps: float = 1e-5
    head_dim: int | None = None
    attention_scale: float | None = None
    bias: bool = True
    gated: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    def attention(self, relative_bias: RelativeBias | None = None) -> Attention:
        """A new attention module of this shape."""
        return Attention(
            self.hidden_dim,
            self.num_heads,
            head_dim=self.head_dim,
            scale=self.attention_scale,
            dropout=self.attention_dropout,
            bias=self.bias,
            relative_bias=relative_bias,
        )

    def feedforward(self) -> FeedForward:
        """A new feed-forward module of this shape."""
        return FeedForward(
            self.hidden_dim,
            self.intermediate_dim,
            self.activation,
            dropout=self.activation_dropout,
            bias=self.bias,
            gated=self.gated,
        )

    def norm(self) -> nn.Module:
        """A new norm of this width."""
        return (RMSNorm if self.rms_norm else nn.LayerNorm)(self.hidden_dim, self.norm_eps)


class _Layer(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.pre_norm = shape.pre_norm
        self.dropout = shape.dropout

    def _residual(self, x: Tensor, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        added = block(norm(x) if self.pre_norm else x)
        if self.training:
            added = F.dropout(added, self.dropout)
        return clamp_overflow(x + added) if self.pre_norm else add_norm(x, added, norm)


class EncoderLayer(_Layer):
    """Self-attention, then feed-forward."""

    def __init__(self, shape: LayerShape, relative_bias: RelativeBias | None = None) -> None:
        super().__init__(shape)
        self.self_attention = shape.attention(relative_bias)
        self.self_attention_norm = shape.norm()
        self.feedforward = shape.feedforward()
        self.feedforward_norm = shape.norm()

    def forward(self, x: Tensor, mask: Tensor | RaggedRows | PackedAttention | None) -> Tensor:
        """x `[B, S, D]`, mask as in Attention or None; or x `[T, D]` and its rows."""
        x = self._residual(x, self.self_attention_norm, lambda h: self.self_attention(h, mask=mask))
        return self._residual(x, self.feedforward_norm, self.feedforward)

    def pack(self, quantization: str | None = None) -> None:
        """Pack the weights for generation."""
        self.self_attention.pack(quantization)
        self.feedforward.pack(quantization)


class DecoderLayer(_Layer):
    """Self-attention, cross-attention, then feed-forward."""

    def __init__(self, shape: LayerShape, relative_bias: RelativeBias | None = None) -> None:
        super().__init__(shape)
        self.self_attention = shape.attention(relative_bias)
        self.self_attention_norm = shape.norm()
        self.cross_attention = shape.attention()
        self.cross_attention_norm = shape.norm()
        self.feedforward = shape.feedforward()
        self.feedforward_norm = shape.norm()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_mask: Tensor | PackedAttention | None,
        self_mask: Tensor | PackedAttention | None = None,
    ) -> Tensor:
        """Whole target sequences: x `[B, T, D]`, memory `[B, S, D]`, memory_mask bool `[B, 1, 1, S]` or None.

        self_mask `[1, H, T, T]`: a causal bias, as RelativeBias makes it; None attends causally without one. Without
        padding: x `[T, D]`, memory `[S, D]`, and where the rows are in both.
        """
        x = self._residual(
            x, self.self_attention_norm, lambda h: self.self_attention(h, mask=self_mask, causal=self_mask is None)
        )
        x = self._residual(x, self.cross_attention_norm, lambda h: self.cross_attention(h, memory, mask=memory_mask))
        return self._residual(x, self.feedforward_norm, self.feedforward)

    def step(self, x: Tensor, cache: "StepCache", index: int) -> Tensor:
        """One new token of every live sequence: x `[N, D]`; the cache holds all earlier ones and the memory."""

        def attend_self(h: Tensor) -> Tensor:
            return self.self_attention.output(cache.attend_self(index, *self.self_attention.project(h)))

        def attend_cross(h: Tensor) -> Tensor:
            return self.cross_attention.output(cache.attend_cross(index, self.cross_attention.project_query(h)))

        x = self._residual(x, self.self_attention_norm, attend_self)
        x = self._residual(x, self.cross_attention_norm, attend_cross)
        return self._residual(x, self.feedforward_norm, self.feedforward)

    def pack(self, quantization: str | None = None) -> None:
        """Pack the weights for generation."""
        self.self_attention.pack(quantization)
        self.cross_attention.pack(quantization, cross=True)
        self.feedforward.pack(quantization)
