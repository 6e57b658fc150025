"""Pegasus (Zhang et al. 2019, arXiv:1912.08777), as transformers computes it: Marian's positions, norms before the
blocks and one after each stack.
"""

from s2s_ray.models.marian import MarianBackbone
from s2s_ray.seq2seq_lm import Seq2SeqLM


class PegasusBackbone(MarianBackbone):
    """The Pegasus network. config: the keys of Hugging Face's `config.json` for `model_type` "pegasus"."""

    model_type = "pegasus"
    pre_norm = True


class PegasusSeq2SeqLM(Seq2SeqLM):
    """Pegasus for generation and fine-tuning."""

    backbone_cls = PegasusBackbone
