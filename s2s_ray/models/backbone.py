"""The contract of an encoder-decoder model, and what all families share.

Dimensions: B rows, S source, T target, N rows x beams, D model, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.generation.cache import Cohort, StepCache
from s2s_ray.nn.attention import Attention
from s2s_ray.nn.feedforward import FeedForward
from s2s_ray.nn.layers import DecoderLayer, EncoderLayer
from s2s_ray.nn.linear import Projection, pack_head
from s2s_ray.nn.packing import PackedAttention, PackedRows, Packing
from s2s_ray.nn.ragged import RaggedRows


class Backbone(nn.Module, ABC):
    """An encoder-decoder network without text handling.

    A family sets `checkpoint_names` (pieces of our parameter names and what the checkpoint calls them, applied in
    order), `checkpoint_aliases` (other checkpoint names that may hold, or repeat, the same tensor),
    `checkpoint_ignored` (names of old checkpoints that no computation uses) and `optional_parameters` (ours, zero when
    the checkpoint has none), builds `encoder_layers` and `decoder_layers`, and says how tokens are embedded and how
    hidden states become logits. Everything here follows.
    """

    model_type: ClassVar[str]
    checkpoint_names: ClassVar[tuple[tuple[str, str], ...]]
    checkpoint_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    checkpoint_ignored: ClassVar[frozenset[str]] = frozenset()
    optional_parameters: ClassVar[frozenset[str]] = frozenset()

    encoder_layers: nn.ModuleList
    decoder_layers: nn.ModuleList

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config: dict[str, Any] = dict(config)
        self.quantization: str | None = None  # None or "int8": of the packed weights, the parameters stay as they are
        self._packed_head: Projection | None = None

    # What a family says.

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """V, the width of the logits."""

    @property
    @abstractmethod
    def max_source_length(self) -> int | None:
        """The most source tokens the encoder has positions for; None when there is no limit."""

    @property
    @abstractmethod
    def max_target_length(self) -> int | None:
        """The most decoder tokens (start token included) there are positions for; None when there is no limit."""

    @abstractmethod
    def embed_source(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """token_ids int64 `[B, S]`, padding_mask bool `[B, S]` to `[B, S, D]`."""

    @abstractmethod
    def embed_target(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """token_ids int64 `[...]`, positions int64 of the same shape (from 0) to `[..., D]`."""

    @abstractmethod
    def output_head(self) -> tuple[Tensor, Tensor | None]:
        """The output projection's weight `[V, D]` and its bias `[V]` or None."""

    @property
    def hidden_dim(self) -> int:
        """D of the decoder's last hidden states."""
        return self.output_head()[0].shape[1]

    def finish_encoder(self, x: Tensor) -> Tensor:
        """What follows the last encoder layer (a final norm in some families)."""
        return x

    def finish_decoder(self, x: Tensor) -> Tensor:
        """What follows the last decoder layer."""
        return x

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the parameters to `dtype`, but for those that a family cannot compute in it."""
        self.to(dtype)

    # What generation and training call.

    def encode(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """token_ids int64 `[B, S]`, padding_mask bool `[B, S]`, True for tokens, to memory `[B, S, D]`."""
        # Asking whether there is padding waits for the device: worth it once a cohort, not in every training step.
        unpadded = not self.training and bool(padding_mask.all())
        mask = None if unpadded else padding_mask[:, None, None]
        x = self.embed_source(token_ids, padding_mask)
        for layer, self_mask in _self_masks(self.encoder_layers, token_ids.shape[1], mask):
            x = layer(x, self_mask)
        return self.finish_encoder(x)

    def encode_ragged(self, token_ids: Tensor, rows: RaggedRows) -> Tensor:
        """token_ids int64 `[B, S]` to memory `[T, D]` of the real tokens alone, one row after another. Needs `pack`."""
        x = rows.pack(self.embed_source(token_ids, rows.padding_mask))
        for layer in self.encoder_layers:
            rows.use(layer.self_attention.relative_bias)  # type: ignore[union-attr, arg-type]
            x = layer(x, rows)
        return self.finish_encoder(x)

    @property
    def packed(self) -> Projection | None:
        """What `pack` made of the head, None when unpacked; another object whenever the weights were packed anew."""
        return self._packed_head

    def init_cache(self, memory: Tensor, padding_mask: Tensor, width: int = 1) -> Cohort:
        """Project memory `[B, S, D]` once to every layer's cross-attention keys and values, shared by `width` sequences
        a row.
        """
        return self._cohort(memory, None if bool(padding_mask.all()) else padding_mask, width)

    def init_ragged_cache(self, memory: Tensor, rows: RaggedRows, width: int = 1) -> Cohort:
        """As `init_cache`, for memory `[T, D]` of the real tokens alone."""
        return self._cohort(memory, rows.padding_mask, width, rows.pad)

    def _cohort(
        self, memory: Tensor, padding_mask: Tensor | None, width: int, pad: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Cohort:
        attentions = [layer.cross_attention for layer in self.decoder_layers if isinstance(layer, DecoderLayer)]
        cross = [(pad(key), pad(value)) for key, value in (a.project_memory(memory) for a in attentions)]
        heads, scale = attentions[0].num_heads, attentions[0].scale
        tables = self.position_tables()
        return Cohort(cross, padding_mask, width=width, num_heads=heads, scale=scale, position_tables=tables)

    def position_tables(self) -> Tensor | None:
        """What the decoder's self-attention adds to its scores for the key that lies 0, 1, ... P - 1 positions back
        (P - 1: or farther), `[1 or layers, H, P]`; one table serves all layers. None without relative positions.
        """
        attentions = [layer.self_attention for layer in self.decoder_layers if isinstance(layer, DecoderLayer)]
        tables = [attention.relative_bias.table() for attention in attentions if attention.relative_bias is not None]
        return torch.stack(tables) if tables else None

    def decode(self, token_ids: Tensor, cache: StepCache) -> Tensor:
        """The newest token of each sequence, int64 `[N]`, to logits `[N, V or more]`: what packing adds to the
        vocabulary has -inf. The cache advances by one.
        """
        return self.project(self.decode_states(token_ids, cache))

    def decode_states(self, token_ids: Tensor, cache: StepCache) -> Tensor:
        """As `decode`, up to the decoder's last hidden states `[N, D]`."""
        cache.begin_step()
        x = self.embed_target(token_ids, cache.positions(token_ids.device))
        for index, layer in enumerate(self.decoder_layers):
            x = layer.step(x, cache, index)  # type: ignore[operator]
        cache.end_step()
        return self.finish_decoder(x)

    def project(self, states: Tensor) -> Tensor:
        """The decoder's last hidden states `[N, D]` to logits `[N, V or more]`, as `decode` gives them."""
        return self.logits(states) if self._packed_head is None else self._packed_head(states)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        packing: Packing | None = None,
        head: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None,
    ) -> Any:
        """Teacher-forced logits `[B, T, V]`; or what `head` makes of the last hidden states `[B, T, D]` and the output
        projection (`output_head`): the loss, which then need not hold all logits at once.

        batch: `encoder_token_ids` int `[B, S]`, `encoder_padding_mask` bool `[B, S]`, `decoder_token_ids` int `[B, T]`.
        With `packing` no layer sees padding: `decoder_token_ids` is `[T]`, of all rows together, and so is the result.
        """
        source, mask = batch["encoder_token_ids"].long(), batch["encoder_padding_mask"].bool()
        target = batch["decoder_token_ids"].long()
        hidden = self._padded if packing is None else partial(self._unpadded, packing)
        x = hidden(source, mask, target)
        return self.logits(x) if head is None else head(x, *self.output_head())

    def _padded(self, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        memory = self.encode(source, mask)
        x = self.embed_target(target, torch.arange(target.shape[1], device=target.device).expand_as(target))
        for layer, self_mask in _self_masks(self.decoder_layers, target.shape[1], None):
            x = layer(x, memory, mask[:, None, None], self_mask)
        return self.finish_decoder(x)

    def _unpadded(self, packing: Packing, source: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        memory = self.encode_packed(source, mask, packing.source)
        x = self.embed_target(target, packing.target.positions())
        cross = PackedAttention(packing.target, packing.source)
        for layer, attention in _self_attentions(self.decoder_layers, packing.target, causal=True):
            x = layer(x, memory, cross, attention)
        return self.finish_decoder(x)

    def encode_packed(self, token_ids: Tensor, padding_mask: Tensor, rows: PackedRows) -> Tensor:
        """As `encode`, to memory `[T, D]` of the real tokens alone; in training, on the weights as they are."""
        x = rows.pack(self.embed_source(token_ids, padding_mask))
        for layer, attention in _self_attentions(self.encoder_layers, rows, causal=False):
            x = layer(x, attention)
        return self.finish_encoder(x)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states `[..., D]` to logits `[..., V]`."""
        if self._packed_head is not None:
            return self._packed_head(x)[..., : self.vocabulary_size]
        return F.linear(x, *self.output_head())

    # Packed weights: made for generation, dropped whenever the parameters may change.

    def pack(self) -> None:
        """Switch to evaluation and to packed weights. Idempotent. Raises SettingsError: see `check_quantization`."""
        if self._packed_head is not None:
            return
        self.eval()
        for layer in (*self.encoder_layers, *self.decoder_layers):
            if isinstance(layer, (EncoderLayer, DecoderLayer)):
                layer.pack(self.quantization)
        self._packed_head = pack_head(*self.output_head(), self.quantization)

    def unpack(self) -> None:
        """Drop the packed weights."""
        self._packed_head = None
        for module in self.modules():
            if isinstance(module, (Attention, FeedForward)):
                module.unpack()

    def train(self, mode: bool = True) -> Self:
        """As torch's; entering training drops the packed weights."""
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack()
        return super()._apply(fn, recurse)

    def aliases(self, name: str) -> tuple[str, ...]:
        """Other names under which a checkpoint may hold, or repeat, the tensor that it calls `name`."""
        return self.checkpoint_aliases.get(name, ())

    def checkpoint_name(self, name: str) -> str:
        """The name a parameter of ours has in the family's checkpoints."""
        for ours, theirs in self.checkpoint_names:
            name = name.replace(ours, theirs)
        return name


def _self_masks(layers: nn.ModuleList, length: int, mask: Tensor | None) -> Iterator[tuple[nn.Module, Tensor | None]]:
    """Each layer with its self-attention's mask: `mask` (bool), or where it has relative positions their bias, -inf
    where `mask` is False. A layer without a bias of its own shares the one before it.
    """
    combined = mask
    for layer in layers:
        attention = layer.self_attention
        if isinstance(attention, Attention) and attention.relative_bias is not None:
            combined = attention.relative_bias(length)
            combined = combined if mask is None else combined.masked_fill(~mask, float("-inf"))
        yield layer, combined


def _self_attentions(
    layers: nn.ModuleList, rows: PackedRows, *, causal: bool
) -> Iterator[tuple[nn.Module, PackedAttention]]:
    """Each layer with the attention of rows without padding, with relative positions as `_self_masks`."""
    attend = PackedAttention(rows, rows, causal)
    for layer in layers:
        attention = layer.self_attention
        if isinstance(attention, Attention) and attention.relative_bias is not None:
            attend = PackedAttention(rows, rows, causal, attention.relative_bias(rows.width))
        yield layer, attend
