"""BART (Lewis et al. 2019, arXiv:1910.13461), as transformers computes it; distilbart's unequal depths included.

Norms follow their blocks, an extra norm follows each embedding, learned positions start at row 2 of their table, and
`final_logits_bias` (absent in some checkpoints) is added to the logits.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.models.backbone import Backbone
from s2s_ray.models.config import activation, integer, number
from s2s_ray.nn.layers import DecoderLayer, EncoderLayer, LayerShape
from s2s_ray.nn.positions import LearnedPositions
from s2s_ray.seq2seq_lm import Seq2SeqLM


class BartBackbone(Backbone):
    """The BART network. config: the keys of Hugging Face's `config.json` for `model_type` "bart"."""

    model_type = "bart"
    checkpoint_names = (
        ("token_embedding", "model.shared"),
        ("source_embedding", "model.encoder.embed_tokens"),
        ("target_embedding", "model.decoder.embed_tokens"),
        ("encoder_positions", "model.encoder.embed_positions"),
        ("decoder_positions", "model.decoder.embed_positions"),
        ("encoder_embedding_norm", "model.encoder.layernorm_embedding"),
        ("decoder_embedding_norm", "model.decoder.layernorm_embedding"),
        ("encoder_layers", "model.encoder.layers"),
        ("decoder_layers", "model.decoder.layers"),
        (".self_attention_norm", ".self_attn_layer_norm"),
        (".cross_attention_norm", ".encoder_attn_layer_norm"),
        (".feedforward_norm", ".final_layer_norm"),
        (".self_attention.", ".self_attn."),
        (".cross_attention.", ".encoder_attn."),
        (".query.", ".q_proj."),
        (".key.", ".k_proj."),
        (".value.", ".v_proj."),
        (".out.", ".out_proj."),
        (".feedforward.up.", ".fc1."),
        (".feedforward.down.", ".fc2."),
        ("logits_bias", "final_logits_bias"),
    )
    checkpoint_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "model.shared.weight": (
            "model.encoder.embed_tokens.weight",
            "model.decoder.embed_tokens.weight",
            "lm_head.weight",
        ),
        "model.encoder.embed_tokens.weight": ("model.shared.weight",),
        "model.decoder.embed_tokens.weight": ("model.shared.weight",),
    }
    checkpoint_ignored = frozenset({"model.encoder.version", "model.decoder.version"})
    optional_parameters = frozenset({"logits_bias"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        dim = integer(config, "d_model")
        self._vocabulary_size = integer(config, "vocab_size")
        self._max_positions = integer(config, "max_position_embeddings")
        self.embedding_scale = dim**0.5 if config.get("scale_embedding") else 1.0
        self.dropout = number(config, "dropout", 0.1)
        tied = config.get("tie_word_embeddings", True)
        self.token_embedding = nn.Embedding(self._vocabulary_size, dim)
        # Untied, transformers keeps three tables beside the output's; the shared one is then unused but saved.
        self.source_embedding = None if tied else nn.Embedding(self._vocabulary_size, dim)
        self.target_embedding = None if tied else nn.Embedding(self._vocabulary_size, dim)
        self.lm_head = None if tied else nn.Linear(dim, self._vocabulary_size, bias=False)
        self.encoder_positions = LearnedPositions(self._max_positions, dim, offset=2)
        self.decoder_positions = LearnedPositions(self._max_positions, dim, offset=2)
        self.encoder_embedding_norm = nn.LayerNorm(dim)
        self.decoder_embedding_norm = nn.LayerNorm(dim)
        encoder, decoder = self._shape(config, "encoder"), self._shape(config, "decoder")
        self.encoder_layers = nn.ModuleList(EncoderLayer(encoder) for _ in range(integer(config, "encoder_layers")))
        self.decoder_layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(integer(config, "decoder_layers")))
        self.logits_bias: Tensor
        self.register_buffer("logits_bias", torch.zeros(1, self._vocabulary_size))

    @staticmethod
    def _shape(config: Mapping[str, Any], side: str) -> LayerShape:
        return LayerShape(
            hidden_dim=integer(config, "d_model"),
            num_heads=integer(config, f"{side}_attention_heads"),
            intermediate_dim=integer(config, f"{side}_ffn_dim"),
            activation=activation(config, "activation_function"),
            dropout=number(config, "dropout", 0.1),
            attention_dropout=number(config, "attention_dropout", 0.0),
            activation_dropout=number(config, "activation_dropout", 0.0),
        )

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def max_source_length(self) -> int | None:
        return self._max_positions

    @property
    def max_target_length(self) -> int | None:
        return self._max_positions

    def embed_source(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        positions = torch.arange(token_ids.shape[-1], device=token_ids.device)
        embedding = self.source_embedding or self.token_embedding
        x = embedding(token_ids) * self.embedding_scale + self.encoder_positions(positions)
        return F.dropout(self.encoder_embedding_norm(x), self.dropout, self.training)

    def embed_target(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        embedding = self.target_embedding or self.token_embedding
        x = embedding(token_ids) * self.embedding_scale + self.decoder_positions(positions)
        return F.dropout(self.decoder_embedding_norm(x), self.dropout, self.training)

    def output_head(self) -> tuple[Tensor, Tensor | None]:
        head = self.token_embedding if self.lm_head is None else self.lm_head
        return head.weight, self.logits_bias[0]


class BartSeq2SeqLM(Seq2SeqLM):
    """BART for generation and fine-tuning; KerasHub's class of the same name."""

    backbone_cls = BartBackbone
