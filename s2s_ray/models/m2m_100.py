"""M2M100 (Fan et al. 2020, arXiv:2010.11125) and NLLB (arXiv:2207.04672), as transformers computes them.

Norms stand before the blocks and one follows each stack, nothing is added to the logits. Positions are sinusoidal and
unlimited; they count the tokens that are not padding, from padding's id + 1, and padding itself has none.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.errors import PresetError
from s2s_ray.models.bart_like import BartLikeBackbone
from s2s_ray.models.config import integer
from s2s_ray.nn.positions import UnboundedSinusoids
from s2s_ray.seq2seq_lm import Seq2SeqLM


class M2M100Backbone(BartLikeBackbone):
    """The M2M100 network. config: the keys of Hugging Face's `config.json` for `model_type` "m2m_100"."""

    model_type = "m2m_100"
    pre_norm = True
    embedding_norm = False
    has_logits_bias = False
    # The table that positions are read from, computed by us; some checkpoints hold it.
    checkpoint_ignored = frozenset({"model.encoder.embed_positions.weights", "model.decoder.embed_positions.weights"})

    def positions(self, config: Mapping[str, Any]) -> nn.Module:
        padding = config.get("pad_token_id")
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise PresetError(f"config.json: pad_token_id must be a token id. Received: {padding!r}")
        self._padding = padding
        return UnboundedSinusoids(integer(config, "d_model"), offset=padding + 1)

    @property
    def max_source_length(self) -> int | None:
        return None

    @property
    def max_target_length(self) -> int | None:
        return None

    def embed_source(self, token_ids: Tensor, padding_mask: Tensor) -> Tensor:
        real = token_ids.ne(self._padding)
        rows = self.encoder_positions(torch.arange(token_ids.shape[-1], device=token_ids.device))
        positions = F.embedding((real.cumsum(dim=-1) - 1).clamp(min=0), rows) * real[..., None]
        return self.embedded(self.source_embedding, token_ids, positions, self.encoder_embedding_norm)

    def embed_target(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        embedded = self.decoder_positions(positions) * token_ids.ne(self._padding)[..., None]
        return self.embedded(self.target_embedding, token_ids, embedded, self.decoder_embedding_norm)


class M2M100Seq2SeqLM(Seq2SeqLM):
    """M2M100 and NLLB for generation and fine-tuning."""

    backbone_cls = M2M100Backbone
