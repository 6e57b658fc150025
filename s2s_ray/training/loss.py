"""The training loss: cross-entropy over real target tokens, summed in fp32 and divided once, by the caller.

Dimensions: D model, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from s2s_ray.errors import SettingsError
from s2s_ray.nn.linear import HEAD_MULTIPLE

IGNORED_LABEL = -100  # transformers' and torch's mark for "no target here"
_CHUNK_LOGITS = {True: 2**28, False: 2**24}  # made at a time, on CUDA and elsewhere: 1 GiB, and 64 MiB for the cache

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


class Sums(NamedTuple):
    """Over a batch's real target tokens, times their weights; fp32 scalars, the loss alone with a graph."""

    loss: Tensor
    negative_log_likelihood: Tensor
    hits: Tensor


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
    count_hits: bool = False,
) -> Sums:
    """Sums of the cross-entropy of the logits `hidden @ weight.T + bias`, so that batches add up before any division.

    hidden `[..., D]`, weight `[V, D]`, bias `[V]` without a gradient, labels int64 and weights `[...]`: 0 for padding,
    else usually 1. Logits are made for a few thousand tokens at a time, in autocast's dtype, and their gradient at
    once, since the whole `[..., V]` in fp32 would be the largest tensor of training. `hits` counts labels that are the
    arg-max, where asked to.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    weights = weights.float() * (labels != IGNORED_LABEL)
    rows = hidden.flatten(0, -2), labels.clamp(min=0).flatten(), weights.flatten()
    with torch.autocast(device, enabled=False):
        loss, rest = _CrossEntropy.apply(
            *rows, weight, bias, label_smoothing, count_hits, dtype, torch.is_grad_enabled()
        )
    return Sums(loss, rest[0], rest[1])


class _CrossEntropy(torch.autograd.Function):
    """Computes its gradients in the forward pass: the logits are there only once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        smoothing: float,
        count_hits: bool,
        dtype: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = len(weight)
        of_hidden, of_weight = (ctx.needs_input_grad[i] and with_gradients for i in (0, 3))
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        grad_weight = torch.zeros_like(weight) if of_weight else None
        matrix, added = weight.to(dtype), None if bias is None else bias.to(dtype)
        missing = -vocabulary % HEAD_MULTIPLE if hidden.is_cuda else 0
        if missing:
            matrix, added = F.pad(matrix, (0, 0, 0, missing)), None if added is None else F.pad(added, (0, missing))
        loss, rest = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(2, dtype=torch.float32)
        size = max(1, _CHUNK_LOGITS[hidden.is_cuda] // vocabulary)
        for part in (slice(start, start + size) for start in range(0, len(hidden), size)):
            states, label, w = hidden[part].to(dtype), labels[part, None], weights[part, None]
            logits = F.linear(states, matrix, added)[:, :vocabulary].float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            nll = normaliser - logits.gather(1, label)
            spread = normaliser - logits.mean(-1, keepdim=True) if smoothing else nll
            loss += (w * nll.lerp(spread, smoothing)).sum()
            rest[0] += (w * nll).sum()
            if count_hits:
                rest[1] += (w * (logits.argmax(-1, keepdim=True) == label)).sum()
            if not (of_hidden or of_weight):
                continue
            slope = logits.sub_(normaliser).exp_().sub_(smoothing / vocabulary)  # in place: it is large
            slope = slope.scatter_add_(1, label, torch.full_like(nll, smoothing - 1)).mul_(w).to(dtype)
            slope = F.pad(slope, (0, missing)) if missing else slope
            if grad_hidden is not None:
                grad_hidden[part] = slope @ matrix
            if grad_weight is not None:
                grad_weight += (slope.T @ states)[:vocabulary]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(rest)
        return loss, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return hidden, None, None, weight, None, None, None, None, None
