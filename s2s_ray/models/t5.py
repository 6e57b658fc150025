"""T5 (Raffel et al. 2020, arXiv:1910.10683) as transformers computes it: T5 1.0, T5 1.1, Flan-T5, ByT5 and MADLAD-400.

RMS norms stand before their blocks, no linear layer has a bias, scores are not scaled, and positions enter as a
relative bias on self-attention that all layers of a stack share.

Whether the head is the embedding and whether its input is rescaled by d_model ** -0.5 are two things. transformers 4
tells both by `tie_word_embeddings`; transformers 5 writes True there for every model, and the second of T5 to
`scale_decoder_outputs`. We write both as they are.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.errors import PresetError
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.config import activation, integer, number
from s2s_ray.nn.layers import DecoderLayer, EncoderLayer, LayerShape
from s2s_ray.nn.positions import RelativeBias
from s2s_ray.seq2seq_lm import Seq2SeqLM


class T5Backbone(Backbone):
    """The T5 network. config: the keys of Hugging Face's `config.json` for `model_type` "t5"."""

    model_type = "t5"
    shares_relative_bias: ClassVar[bool] = True
    checkpoint_names = (
        ("token_embedding", "shared"),
        ("encoder_layers", "encoder.block"),
        ("decoder_layers", "decoder.block"),
        ("encoder_norm", "encoder.final_layer_norm"),
        ("decoder_norm", "decoder.final_layer_norm"),
        (".self_attention_norm", ".layer.0.layer_norm"),
        (".self_attention.", ".layer.0.SelfAttention."),
        (".cross_attention_norm", ".layer.1.layer_norm"),
        (".cross_attention.", ".layer.1.EncDecAttention."),
        (".relative_bias.", ".relative_attention_bias."),
        (".query.", ".q."),
        (".key.", ".k."),
        (".value.", ".v."),
        (".out.", ".o."),
        (".gate.", ".wi_0."),
        (".down.", ".wo."),
    )
    checkpoint_aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "lm_head.weight": ("shared.weight",),  # in files that were saved with a shared head
    }
    # The first files hold a bias for cross-attention, which the model never had.
    checkpoint_ignored = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        dim = integer(config, "d_model")
        self._vocabulary_size = integer(config, "vocab_size")
        self.dropout = number(config, "dropout_rate", 0.1)
        shape = _shape(config)
        self._up = "wi_1" if shape.gated else "wi"
        scaled, own_head = self.output_form(config)
        self.config |= {"tie_word_embeddings": not own_head, "scale_decoder_outputs": scaled}
        self.output_scale = dim**-0.5 if scaled else 1.0
        self.token_embedding = nn.Embedding(self._vocabulary_size, dim)
        self.lm_head = nn.Linear(dim, self._vocabulary_size, bias=False) if own_head else None
        depth = integer(config, "num_layers")
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(shape, self._relative_bias(config, index, causal=False)) for index in range(depth)
        )
        if config.get("num_decoder_layers") is not None:
            depth = integer(config, "num_decoder_layers")
        self.decoder_layers = nn.ModuleList(
            DecoderLayer(shape, self._relative_bias(config, index, causal=True)) for index in range(depth)
        )
        self.encoder_norm = shape.norm()
        self.decoder_norm = shape.norm()

    @staticmethod
    def output_form(config: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether the head's input is rescaled, and whether the head has a weight of its own."""
        scaled = config.get("scale_decoder_outputs")
        if scaled is None:
            scaled = config.get("tie_word_embeddings") is not False
        return bool(scaled), not scaled

    def _relative_bias(self, config: Mapping[str, Any], index: int, *, causal: bool) -> RelativeBias | None:
        if index and self.shares_relative_bias:
            return None
        buckets = integer(config, "relative_attention_num_buckets")
        distance = int(number(config, "relative_attention_max_distance", 128))
        if buckets < 4 or distance <= buckets:
            raise PresetError(
                "config.json: relative_attention_num_buckets must be at least 4 and less than "
                f"relative_attention_max_distance. Received: {buckets} and {distance}"
            )
        return RelativeBias(buckets, integer(config, "num_heads"), distance, causal=causal)

    def cast(self, dtype: torch.dtype) -> None:
        super().cast(dtype)
        if dtype == torch.float16:  # activations before the last product exceed fp16's range
            for layer in (*self.encoder_layers, *self.decoder_layers):
                layer.get_submodule("feedforward.down").float()

    def checkpoint_name(self, name: str) -> str:
        block = ".layer.1" if name.startswith("encoder") else ".layer.2"
        name = name.replace(".feedforward_norm", f"{block}.layer_norm")
        name = name.replace(".feedforward.", f"{block}.DenseReluDense.").replace(".up.", f".{self._up}.")
        return super().checkpoint_name(name)

    @property
    def vocabulary_size(self) -> int:
        return self._vocabulary_size

    @property
    def max_source_length(self) -> int | None:
        return None

    @property
    def max_target_length(self) -> int | None:
        return None

    def embed_source(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        return self._dropped(self.token_embedding(token_ids))

    def embed_target(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self._dropped(self.token_embedding(token_ids))

    def finish_encoder(self, x: Tensor) -> Tensor:
        return self._dropped(self.encoder_norm(x))

    def finish_decoder(self, x: Tensor) -> Tensor:
        return self._dropped(self.decoder_norm(x)) * self.output_scale

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def output_head(self) -> tuple[Tensor, Tensor | None]:
        return (self.token_embedding if self.lm_head is None else self.lm_head).weight, None


def _shape(config: Mapping[str, Any]) -> LayerShape:
    form, _, name = str(config.get("feed_forward_proj", "relu")).rpartition("-")
    if form not in ("", "gated"):
        raise PresetError(
            'config.json: feed_forward_proj must be an activation or "gated-" and one. '
            f"Received: {config['feed_forward_proj']!r}"
        )
    name = "gelu_new" if (form, name) == ("gated", "gelu") else name
    dropout = number(config, "dropout_rate", 0.1)
    return LayerShape(
        hidden_dim=integer(config, "d_model"),
        num_heads=integer(config, "num_heads"),
        head_dim=integer(config, "d_kv"),
        intermediate_dim=integer(config, "d_ff"),
        activation=activation({"feed_forward_proj": name}, "feed_forward_proj"),
        gated=form == "gated",
        pre_norm=True,
        rms_norm=True,
        norm_eps=number(config, "layer_norm_epsilon", 1e-6),
        attention_scale=1.0,
        bias=False,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
    )


class T5Seq2SeqLM(Seq2SeqLM):
    """T5 for generation and fine-tuning; KerasHub's class of the same name."""

    backbone_cls = T5Backbone
