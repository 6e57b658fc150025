"""The training loss: cross-entropy over real target tokens, summed in fp32 and divided once, by the caller.

Dimensions: B rows, T target length, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from s2s_ray.errors import SettingsError

IGNORED_LABEL = -100  # transformers' and torch's mark for "no target here"

Reduction = Literal["tokens", "keras"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Loss settings for `compile(loss=...)`.

    `label_smoothing` is the share of the target's probability spread evenly over the vocabulary, as in torch and in
    transformers' Trainer. `reduction="tokens"` divides the summed loss by the number of real target tokens;
    `"keras"` divides by the padded size B x T, which is what KerasHub's `fit` does (Keras' `sum_over_batch_size`),
    so its value depends on the padding. Raises SettingsError when a value is out of range.
    """

    label_smoothing: float = 0.0
    reduction: Reduction = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise SettingsError(f"label_smoothing must be from 0 to below 1. Received: {self.label_smoothing!r}")
        if self.reduction not in ("tokens", "keras"):
            raise SettingsError(f'reduction must be "tokens" or "keras". Received: {self.reduction!r}')


LOSSES: dict[str, CrossEntropy] = {
    "auto": CrossEntropy(),
    "cross_entropy": CrossEntropy(),
    "keras": CrossEntropy(reduction="keras"),
    "sparse_categorical_crossentropy": CrossEntropy(reduction="keras"),
}


def check_loss(loss: object) -> CrossEntropy:
    """Loss settings from a name or settings. Raises SettingsError that lists the known names."""
    if isinstance(loss, CrossEntropy):
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss]
    raise SettingsError(f"loss must be one of {', '.join(LOSSES)}, or CrossEntropy(...). Received: {loss!r}")


def real_token_weights(labels: Tensor, weights: Tensor) -> Tensor:
    """`weights` in fp32 with zeros where a label is IGNORED_LABEL; both `[B, T]`."""
    return weights.float() * (labels != IGNORED_LABEL)


def loss_weight(weights: Tensor, reduction: Reduction) -> Tensor:
    """What a batch's summed loss is divided by (a scalar): the sum of `weights` `[B, T]`, or their number for
    "keras".
    """
    if reduction == "keras":
        return torch.tensor(float(weights.numel()), device=weights.device)
    return weights.float().sum()


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: Reduction = "tokens",
) -> tuple[Tensor, Tensor]:
    """(summed loss, what to divide it by), both fp32 scalars, so that batches add up before the division.

    logits `[B, T, V]` of any float type, labels int64 `[B, T]`, weights `[B, T]`: 0 for padding, else usually 1.
    """
    weights = real_token_weights(labels, weights)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED_LABEL,
        label_smoothing=label_smoothing,
    )
    return (losses * weights.flatten()).sum(), loss_weight(weights, reduction)
