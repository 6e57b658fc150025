"""umT5 (Chung et al. 2023, arXiv:2304.09151): mT5 with a relative bias in every layer."""

from collections.abc import Mapping
from typing import Any

from s2s_ray.models.t5 import T5Backbone
from s2s_ray.seq2seq_lm import Seq2SeqLM


class UMT5Backbone(T5Backbone):
    """The umT5 network. config: the keys of Hugging Face's `config.json` for `model_type` "umt5"."""

    model_type = "umt5"
    shares_relative_bias = False

    @staticmethod
    def output_form(config: Mapping[str, Any]) -> tuple[bool, bool]:
        """The flag says whether to rescale, as transformers 4 reads it and 5 writes it (which reads it as always on).
        Files of 5 do not say whether the head is the embedding, so it has a weight of its own, a copy where the file
        holds one tensor.
        """
        scaled = config.get("scale_decoder_outputs")
        return bool(config.get("tie_word_embeddings", True) if scaled is None else scaled), True


class UMT5Seq2SeqLM(Seq2SeqLM):
    """umT5 for generation and fine-tuning."""

    backbone_cls = UMT5Backbone
