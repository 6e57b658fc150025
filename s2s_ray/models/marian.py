"""Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344; the Opus-MT models), as transformers computes it.

BART without the norm after the embeddings and with sinusoidal positions, counted from 0. Source and target may have
vocabularies of their own (`share_encoder_decoder_embeddings` false, `decoder_vocab_size`).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from s2s_ray.models.bart_like import BartLikeBackbone
from s2s_ray.models.config import integer
from s2s_ray.nn.positions import SinusoidalPositions
from s2s_ray.seq2seq_lm import Seq2SeqLM

_MAX_POSITIONS = 2**16


class MarianBackbone(BartLikeBackbone):
    """The Marian network. config: the keys of Hugging Face's `config.json` for `model_type` "marian"."""

    model_type = "marian"
    embedding_norm = False
    optional_parameters = BartLikeBackbone.optional_parameters | {
        "encoder_positions.weight",
        "decoder_positions.weight",
    }

    def positions(self, config: Mapping[str, Any]) -> nn.Module:
        # No file bounds this table: the limit is what a wrong config may make us allocate.
        length = integer(config, "max_position_embeddings", most=_MAX_POSITIONS)
        return SinusoidalPositions(length, integer(config, "d_model"))


class MarianSeq2SeqLM(Seq2SeqLM):
    """Marian for generation and fine-tuning."""

    backbone_cls = MarianBackbone
