"""The best tokens of each sequence, without sorting the vocabulary.

Dimensions: N sequences, V vocabulary, C candidates, K tokens a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2s_ray import kernels

_BLOCK = 128
Best = tuple[Tensor, Tensor, Tensor | None]


def best(scores: Tensor | Best, count: int, *, normaliser: bool) -> Best:
    """scores `[N, V]` to their `count` best values fp32 `[N, C]`, best first, and their tokens int64 `[N, C]`.

    normaliser: also the log of the sum of exponentials, fp32 `[N]`. A row that holds a NaN or positive infinity has it
    among its values. What the output projection chose already (`Search.wanted`) is handed back.
    """
    if isinstance(scores, tuple):
        return scores
    kernel = kernels.load("selection", scores.device)
    if kernel is not None:
        values, tokens, total = kernel.best(scores.contiguous(), count)
        return values, tokens, total if normaliser else None
    scores = scores.float()
    values, tokens = top(scores, count)
    return values, tokens, scores.logsumexp(dim=-1) if normaliser else None


def force(scores: Tensor, now: Tensor, tokens: Tensor) -> None:
    """Where now bool `[N]` is set, leave the row of scores `[N, V]` no choice but tokens int64 `[N]`: 0 among -inf."""
    kernel = kernels.load("selection", scores.device)
    if kernel is not None and scores.is_contiguous():
        kernel.force(scores, now, tokens)
        return
    scores.masked_fill_(now[:, None], float("-inf"))
    scores.scatter_(1, tokens[:, None], torch.where(now[:, None], 0.0, scores.gather(1, tokens[:, None])))


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of scores `[N, V]`, `[N, C]`, best first, and their tokens int64 `[N, C]`.

    Blocks first: the C best tokens lie in the C blocks with the best maxima, and a maximum alone is a vector operation
    where a maximum with its index is not.
    """
    vocabulary = scores.shape[1]
    whole = vocabulary // _BLOCK
    if whole < 4 * count:
        return scores.topk(count, dim=-1)
    blocks = scores[:, : whole * _BLOCK].unflatten(1, (whole, _BLOCK))
    maxima = blocks.amax(dim=-1)
    chosen = maxima.argmax(dim=-1, keepdim=True) if count == 1 else maxima.topk(count, dim=-1).indices
    candidates = blocks.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    rest = scores[:, whole * _BLOCK :]
    tokens = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK, device=scores.device)).flatten(1)
    tokens = pad(tokens, (0, rest.shape[1]))
    tokens[:, tokens.shape[1] - rest.shape[1] :] = torch.arange(whole * _BLOCK, vocabulary, device=scores.device)
    candidates = torch.cat((candidates, rest), dim=1)
    values, places = candidates.max(dim=-1, keepdim=True) if count == 1 else candidates.topk(count, dim=-1)
    return values, tokens.gather(1, places)
