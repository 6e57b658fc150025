"""LongT5 (Guo et al. 2022, arXiv:2112.07916) as transformers computes it: T5 with an encoder for long sources.

Its self-attention is local, or with "transient-global" also reaches the sums of all blocks of the source, which every
layer makes anew. The decoder is T5's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s2s_ray.errors import UnsupportedModelError
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.config import integer, number
from s2s_ray.models.t5 import T5Backbone
from s2s_ray.nn.local import LocalAttention, SourceBlocks
from s2s_ray.nn.norms import RMSNorm
from s2s_ray.nn.packing import PackedRows
from s2s_ray.nn.ragged import RaggedRows
from s2s_ray.seq2seq_lm import Seq2SeqLM

_TYPES = {"local": ".LocalSelfAttention.", "transient-global": ".TransientGlobalSelfAttention."}


class LongT5Backbone(T5Backbone):
    """The LongT5 network. config: the keys of Hugging Face's `config.json` for `model_type` "longt5"."""

    model_type = "longt5"
    checkpoint_ignored = frozenset()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        kind = config.get("encoder_attention_type", "local")
        if not isinstance(kind, str) or kind not in _TYPES:
            raise UnsupportedModelError(
                f"config.json: encoder_attention_type must be one of {', '.join(_TYPES)}. Received: {kind!r}"
            )
        self._checkpoint_attention = _TYPES[kind]
        self._block = integer({"local_radius": 127, **config}, "local_radius") + 1
        self._sum = integer({"global_block_size": 16, **config}, "global_block_size") if kind != "local" else 0
        dim, eps = integer(config, "d_model"), number(config, "layer_norm_epsilon", 1e-6)
        for index, layer in enumerate(self.encoder_layers):
            norm = RMSNorm(dim, eps) if self._sum else None
            bias = self._relative_bias(config, index, causal=False) if self._sum else None
            attention: Any = layer.self_attention
            layer.self_attention = LocalAttention(attention, dim, sum_norm=norm, sum_bias=bias)

    def cast(self, dtype: torch.dtype) -> None:
        Backbone.cast(self, dtype)  # no product stays in fp32, as in transformers

    def checkpoint_name(self, name: str) -> str:
        name = name.replace(".sum_norm.", ".global_input_layer_norm.")
        name = name.replace(".sum_bias.", ".global_relative_attention_bias.")
        name = super().checkpoint_name(name)
        return name.replace(".SelfAttention.", self._checkpoint_attention) if name.startswith("encoder") else name

    def encode(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        first: Any = self.encoder_layers[0].self_attention
        blocks = SourceBlocks(padding_mask, self._block, first.relative_bias, self._sum, first.sum_bias)
        x = self.embed_source(token_ids, padding_mask)
        for layer in self.encoder_layers:
            x = layer(x, blocks)
        return self.finish_encoder(x)

    def encode_packed(self, token_ids: Tensor, padding_mask: Tensor, rows: PackedRows) -> Tensor:
        return rows.pack(self.encode(token_ids, padding_mask))

    def encode_ragged(self, token_ids: Tensor, rows: RaggedRows) -> Tensor:
        return rows.pack(self.encode(token_ids, rows.padding_mask))


class LongT5Seq2SeqLM(Seq2SeqLM):
    """LongT5 for generation and fine-tuning."""

    backbone_cls = LongT5Backbone
