"""The loss against transformers, torch and Keras' formula."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration
from transformers.trainer_pt_utils import LabelSmoother

from s2s_ray.errors import SettingsError
from s2s_ray.training import loss as loss_module
from s2s_ray.training.compiled import ACCURACY, PERPLEXITY, check_compiled
from s2s_ray.training.loss import CrossEntropy, Sums, check_loss, cross_entropy


def sums_of(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, **options) -> Sums:
    """With an identity as the output projection, hidden states are logits."""
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return cross_entropy(logits, identity, None, labels=labels, weights=weights, **options)


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
    torch.testing.assert_close(sums_of(output.logits, labels, weights).loss / weights.sum(), output.loss)


def test_label_smoothing_equals_transformers_trainer(batch):
    logits, labels, weights = batch
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, labels.masked_fill(weights == 0, -100))
    sums = sums_of(logits, labels, weights, label_smoothing=0.1)
    torch.testing.assert_close(sums.loss / weights.sum(), expected)
    torch.testing.assert_close(sums.negative_log_likelihood, sums_of(logits, labels, weights).loss)


def test_ignored_labels_and_row_weights_count_as_given(batch):
    logits, labels, weights = batch
    expected = sums_of(logits, labels, weights)
    total = sums_of(logits, labels.masked_fill(weights == 0, -100), torch.ones_like(weights)).loss
    torch.testing.assert_close(total, expected.loss)
    torch.testing.assert_close(sums_of(logits, labels, weights * 2).loss, expected.loss * 2)


def test_half_precision_logits_are_summed_in_fp32(batch):
    logits, labels, weights = batch
    total = sums_of(logits.bfloat16(), labels, weights).loss
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, sums_of(logits.bfloat16().float(), labels, weights).loss)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_and_hits_equal_torch_in_chunks(monkeypatch, frozen):
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (21, 11))
    bias = torch.randn(11, generator=generator, dtype=torch.float64)
    labels, weights = torch.randint(0, 11, (21,), generator=generator), torch.rand(21, generator=generator)
    hidden.requires_grad_(), weight.requires_grad_(not frozen)
    logits = hidden @ weight.T + bias
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    leaves = [hidden] if frozen else [hidden, weight]
    expected = torch.autograd.grad((losses * weights).sum() * 3, leaves)
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", {False: 4 * 11})  # four rows at a time
    options = {"labels": labels, "weights": weights, "label_smoothing": 0.1, "count_hits": True}
    sums = cross_entropy(hidden, weight, bias, **options)
    torch.testing.assert_close(sums.hits, (weights * (logits.argmax(-1) == labels)).sum().float())
    for ours, theirs in zip(torch.autograd.grad(sums.loss * 3, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, bias, **options).loss, sums.loss.detach())


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
