"""The loss against transformers, torch and Keras' formula."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration
from transformers.trainer_pt_utils import LabelSmoother

from s2s_ray.errors import SettingsError
from s2s_ray.training.compiled import ACCURACY, PERPLEXITY, check_compiled
from s2s_ray.training.loss import CrossEntropy, check_loss, cross_entropy


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    weights = (torch.arange(7) < torch.tensor([7, 4, 2])[:, None]).float()
    return logits, labels, weights


def test_equals_transformers_loss(batch):
    _logits, labels, weights = batch
    sides = {
        f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    model = BartForConditionalGeneration(BartConfig(vocab_size=11, d_model=8, **sides)).eval()
    masked = labels.masked_fill(weights == 0, -100)
    output = model(input_ids=torch.ones(3, 4, dtype=torch.long), labels=masked)
    total, count = cross_entropy(output.logits, labels, weights)
    assert count == weights.sum()
    torch.testing.assert_close(total / count, output.loss)


def test_label_smoothing_equals_transformers_trainer(batch):
    logits, labels, weights = batch
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels.masked_fill(weights == 0, -100))
    total, count = cross_entropy(logits, labels, weights, label_smoothing=0.1)
    torch.testing.assert_close(total / count, expected)


def test_keras_reduction_divides_by_the_padded_size(batch):
    logits, labels, weights = batch
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    total, size = cross_entropy(logits, labels, weights, reduction="keras")
    assert size == 21
    torch.testing.assert_close(total / size, (losses * weights).mean())


def test_ignored_labels_and_row_weights_count_as_given(batch):
    logits, labels, weights = batch
    expected, _ = cross_entropy(logits, labels, weights)
    total, _ = cross_entropy(logits, labels.masked_fill(weights == 0, -100), torch.ones_like(weights))
    torch.testing.assert_close(total, expected)
    doubled, count = cross_entropy(logits, labels, weights * 2)
    torch.testing.assert_close(doubled, expected * 2)
    assert count == 26


def test_half_precision_logits_are_summed_in_fp32(batch):
    logits, labels, weights = batch
    total, _ = cross_entropy(logits.bfloat16(), labels, weights)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, cross_entropy(logits.bfloat16().float(), labels, weights)[0])


@pytest.mark.parametrize("settings", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"reduction": "mean"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError, match="Received"):
        CrossEntropy(**settings)


def test_unknown_names_fail_at_compile_and_list_the_known(task):
    with pytest.raises(SettingsError, match="auto, cross_entropy, keras"):
        check_loss("mse")
    with pytest.raises(SettingsError, match="adamw"):
        task.compile(optimizer="adamax")
    with pytest.raises(SettingsError, match="perplexity"):
        task.compile(weighted_metrics=["bleu"])


def test_metric_names_are_keras_names():
    assert check_compiled(weighted_metrics=["accuracy", "perplexity"]).weighted_metrics == (ACCURACY, PERPLEXITY)
    assert check_compiled(weighted_metrics=None).weighted_metrics == ()
    assert check_compiled().loss == CrossEntropy()
