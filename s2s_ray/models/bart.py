"""BART (Lewis et al. 2019, arXiv:1910.13461), as transformers computes it; distilbart's unequal depths included.

Norms follow their blocks, an extra norm follows each embedding, learned positions start at row 2 of their table, and
`final_logits_bias` is added to the logits.
"""

from s2s_ray.models.bart_like import BartLikeBackbone
from s2s_ray.seq2seq_lm import Seq2SeqLM


class BartBackbone(BartLikeBackbone):
    """The BART network. config: the keys of Hugging Face's `config.json` for `model_type` "bart"."""

    model_type = "bart"


class BartSeq2SeqLM(Seq2SeqLM):
    """BART for generation and fine-tuning; KerasHub's class of the same name."""

    backbone_cls = BartBackbone
