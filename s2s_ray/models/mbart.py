"""mBART (Liu et al. 2020, arXiv:2001.08210) and mBART-50, as transformers computes them: BART with norms before the
blocks and one after each stack. The two differ in where the language token stands, which is the preprocessor's matter.
"""

from s2s_ray.models.bart_like import BartLikeBackbone
from s2s_ray.seq2seq_lm import Seq2SeqLM


class MBartBackbone(BartLikeBackbone):
    """The mBART network. config: the keys of Hugging Face's `config.json` for `model_type` "mbart"."""

    model_type = "mbart"
    pre_norm = True


class MBartSeq2SeqLM(Seq2SeqLM):
    """mBART and mBART-50 for generation and fine-tuning."""

    backbone_cls = MBartBackbone
