"""BART's network and what the families derived from it change: where norms stand, positions, tables, the logits bias.

Hugging Face's names of the parameters are the same in all of them.
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

_SHARED, _SOURCE, _TARGET = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
)
_HEAD = "lm_head.weight"


class BartLikeBackbone(Backbone):
    """What BART's relatives share; a family sets what differs.

    `pre_norm`: norms stand before their blocks, and one more follows each stack; otherwise after them, and none.
    `embedding_norm`: a norm follows the embeddings. `has_logits_bias`: the logits have one, absent in some checkpoints.
    `positions` makes a stack's position embeddings.
    """

    pre_norm: ClassVar[bool] = False
    embedding_norm: ClassVar[bool] = True
    has_logits_bias: ClassVar[bool] = True

    checkpoint_names = (
        ("token_embedding", "model.shared"),
        ("source_embedding", "model.encoder.embed_tokens"),
        ("target_embedding", "model.decoder.embed_tokens"),
        ("encoder_positions", "model.encoder.embed_positions"),
        ("decoder_positions", "model.decoder.embed_positions"),
        ("encoder_embedding_norm", "model.encoder.layernorm_embedding"),
        ("decoder_embedding_norm", "model.decoder.layernorm_embedding"),
        ("encoder_norm", "model.encoder.layer_norm"),
        ("decoder_norm", "model.decoder.layer_norm"),
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
    checkpoint_ignored = frozenset({"model.encoder.version", "model.decoder.version"})
    optional_parameters = frozenset({"logits_bias"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        dim = integer(config, "d_model")
        self.embedding_scale = dim**0.5 if config.get("scale_embedding") else 1.0
        self.dropout = number(config, "dropout", 0.1)
        self._make_tables(config, dim)
        self.encoder_positions = self.positions(config)
        self.decoder_positions = self.positions(config)
        encoder, decoder = self._shape(config, "encoder"), self._shape(config, "decoder")
        self.encoder_embedding_norm = encoder.norm() if self.embedding_norm else nn.Identity()
        self.decoder_embedding_norm = decoder.norm() if self.embedding_norm else nn.Identity()
        self.encoder_layers = nn.ModuleList(EncoderLayer(encoder) for _ in range(integer(config, "encoder_layers")))
        self.decoder_layers = nn.ModuleList(DecoderLayer(decoder) for _ in range(integer(config, "decoder_layers")))
        self.encoder_norm = encoder.norm() if self.pre_norm else nn.Identity()
        self.decoder_norm = decoder.norm() if self.pre_norm else nn.Identity()

    def _make_tables(self, config: Mapping[str, Any], dim: int) -> None:
        """The embeddings, the head and its bias.

        Tied, one table serves all three. Untied, transformers 5 keeps three beside the shared one, which is then saved
        though unused; transformers 4 saved the shared one alone, and both sides used it. With two vocabularies
        (Marian's alone) each side has its table, and tying is between the decoder's and the head.
        """
        source_size = integer(config, "vocab_size")
        tied = config.get("tie_word_embeddings", True)
        one = config.get("share_encoder_decoder_embeddings", True)
        size = self._vocabulary_size = source_size if one else integer(config, "decoder_vocab_size")
        self.token_embedding = nn.Embedding(size, dim) if one else None
        self.source_embedding = None if one and tied else nn.Embedding(source_size, dim)
        self.target_embedding = None if one and tied else nn.Embedding(size, dim)
        self.lm_head = None if tied else nn.Linear(dim, size, bias=False)
        if one:
            copies = (_SOURCE, _TARGET, _HEAD) if tied else (_SOURCE,)
            self._aliases = {_SHARED: copies, _SOURCE: (_SHARED,), _TARGET: (_SHARED,)}
        else:
            self._aliases = {_TARGET: (_HEAD,)} if tied else {}
        self.logits_bias: Tensor | None
        self.register_buffer("logits_bias", torch.zeros(1, size) if self.has_logits_bias else None)

    def _shape(self, config: Mapping[str, Any], side: str) -> LayerShape:
        return LayerShape(
            hidden_dim=integer(config, "d_model"),
            num_heads=integer(config, f"{side}_attention_heads"),
            intermediate_dim=integer(config, f"{side}_ffn_dim"),
            activation=activation(config, "activation_function"),
            pre_norm=self.pre_norm,
            dropout=number(config, "dropout", 0.1),
            attention_dropout=number(config, "attention_dropout", 0.0),
            activation_dropout=number(config, "activation_dropout", 0.0),
        )

    def aliases(self, name: str) -> tuple[str, ...]:
        return self._aliases.get(name, ())

    def positions(self, config: Mapping[str, Any]) -> nn.Module:
        """One stack's position embeddings: positions int64 `[...]`, from 0, to `[..., D]`. BART's are learned."""
        return LearnedPositions(integer(config, "max_position_embeddings"), integer(config, "d_model"), offset=2)

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def max_source_length(self) -> int | None:
        return integer(self.config, "max_position_embeddings")

    @property
    def max_target_length(self) -> int | None:
        return integer(self.config, "max_position_embeddings")

    def embed_source(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        positions = self.encoder_positions(torch.arange(token_ids.shape[-1], device=token_ids.device))
        return self.embedded(self.source_embedding, token_ids, positions, self.encoder_embedding_norm)

    def embed_target(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        embedded = self.decoder_positions(positions)
        return self.embedded(self.target_embedding, token_ids, embedded, self.decoder_embedding_norm)

    def embedded(self, own: nn.Embedding | None, token_ids: Tensor, positions: Tensor, norm: nn.Module) -> Tensor:
        """token_ids int64 `[...]` and their positions' embeddings `[..., D]` to `[..., D]`; `own`: the side's table."""
        table = own or self.token_embedding
        assert table is not None
        x = table(token_ids) * self.embedding_scale
        x = norm(x + positions.to(x.dtype))
        return F.dropout(x, self.dropout, self.training)

    def finish_encoder(self, x: Tensor) -> Tensor:
        return self.encoder_norm(x)

    def finish_decoder(self, x: Tensor) -> Tensor:
        return self.decoder_norm(x)

    def output_head(self) -> tuple[Tensor, Tensor | None]:
        head = self.lm_head or self.target_embedding or self.token_embedding
        assert head is not None
        return head.weight, None if self.logits_bias is None else self.logits_bias[0]
