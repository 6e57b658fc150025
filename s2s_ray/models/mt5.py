"""mT5 (Xue et al. 2020, arXiv:2010.11934): T5 1.1 with a multilingual vocabulary."""

from collections.abc import Mapping
from typing import Any

from s2s_ray.models.t5 import T5Backbone
from s2s_ray.seq2seq_lm import Seq2SeqLM


class MT5Backbone(T5Backbone):
    """The mT5 network. config: the keys of Hugging Face's `config.json` for `model_type` "mt5"."""

    model_type = "mt5"

    @staticmethod
    def output_form(config: Mapping[str, Any]) -> tuple[bool, bool]:
        """transformers 5 never rescales, whatever the flag; transformers 4 did where it was set."""
        scaled = config.get("scale_decoder_outputs")
        if scaled is None:
            by_version_4 = str(config.get("transformers_version", "")).startswith("4.")
            scaled = by_version_4 and bool(config.get("tie_word_embeddings"))
        return bool(scaled), not scaled


class MT5Seq2SeqLM(Seq2SeqLM):
    """mT5 for generation and fine-tuning."""

    backbone_cls = MT5Backbone
