"""One step of every family, with and without padding: loss and gradients are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from s2s_ray.models.backbone import Backbone
from s2s_ray.training.batches import Batch
from s2s_ray.training.loss import CrossEntropy
from s2s_ray.training.step import Forward, Totals
from tests.models.contract import load_ours, ordinary_tokens, padded, reference_model, sources, vary_norms_and_biases
from tests.models.test_longt5 import GLOBAL, LONG
from tests.models.test_t5 import with_own_head

SIZES = {
    "vocab_size": 211, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "init_std": 0.2,
}  # fmt: skip
T5_SIZES = {"vocab_size": 211, "d_model": 32, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
MARIAN = {"activation_function": "swish", "scale_embedding": True, "pad_token_id": 150, "decoder_start_token_id": 150,
          "eos_token_id": 0}  # fmt: skip
FAMILIES = {
    "bart": transformers.BartConfig(**SIZES),
    "bart-own-head": transformers.BartConfig(**SIZES, tie_word_embeddings=False),
    "mbart": transformers.MBartConfig(**SIZES, scale_embedding=True, decoder_start_token_id=2),
    "marian": transformers.MarianConfig(**SIZES, **MARIAN),
    "marian-two-vocabularies": transformers.MarianConfig(
        **SIZES, **MARIAN, share_encoder_decoder_embeddings=False, decoder_vocab_size=160
    ),
    "pegasus": transformers.PegasusConfig(**SIZES, scale_embedding=True, activation_function="relu"),
    "m2m_100": transformers.M2M100Config(**SIZES),
    "t5": transformers.T5Config(**T5_SIZES),
    "t5-own-head": transformers.T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": transformers.MT5Config(**T5_SIZES),
    "umt5": transformers.UMT5Config(**T5_SIZES),
    "longt5": transformers.LongT5Config(**LONG, **GLOBAL),
}


def make_batch(config: Any) -> Batch:
    """Nine rows of ragged sources and targets; what the decoder reads is not the labels moved on, so that each counts
    by itself.
    """
    ids, mask = padded(sources(config, 9), config.pad_token_id)
    generator = torch.Generator().manual_seed(5)
    size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    lengths = torch.randint(1, 12, (9,), generator=generator)
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    target, labels = (ordinary_tokens(config, size, tuple(inside.shape), generator) for _ in range(2))
    x = {"encoder_token_ids": ids, "encoder_padding_mask": mask, "decoder_token_ids": target}
    return Batch.from_arrays(x | {"decoder_padding_mask": inside}, labels)


def gradients(backbone: Backbone, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    backbone.zero_grad()
    loss = Forward(backbone, CrossEntropy())(batch, Totals()) / batch.target_weight
    loss.backward()
    found = {backbone.checkpoint_name(name): p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_one_step_equal_transformers(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    own_head = family in ("t5-own-head", "mt5", "umt5")
    model = reference_model(config, adjust=with_own_head if own_head else vary_norms_and_biases)
    backbone, batch = load_ours(model, tmp_path), make_batch(config)
    output = model(
        input_ids=batch.inputs["encoder_token_ids"],
        attention_mask=batch.inputs["encoder_padding_mask"].long(),
        decoder_input_ids=batch.inputs["decoder_token_ids"],
        labels=batch.labels.masked_fill(batch.weights == 0, -100),
    )
    output.loss.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    packed = batch.packed()
    assert packed.packing is not None
    for form in (batch, packed):
        loss, ours = gradients(backbone, form)
        assert loss == pytest.approx(output.loss.item(), rel=1e-6)
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5 * largest, rtol=1e-4, msg=name)
