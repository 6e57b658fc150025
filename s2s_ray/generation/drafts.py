"""What speculative decoding guesses the next tokens from, and the cache that takes several tokens of a row at once.

Dimensions: R rows, W tokens fed a row, N = R x W, H heads, K head size, C buffer capacity, D model.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from s2s_ray.generation import selection
from s2s_ray.generation.cache import DecoderCache
from s2s_ray.generation.requests import Request
from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.ragged import pad_sources

_GROWTH = 64  # positions
_LONGEST_NGRAM = 3  # tokens looked up in the source, then fewer


class ChainCache:
    """A StepCache of rows of any ages: a step adds `width` tokens to each row, and `accept` says how many stay.

    A position is a place in the buffers, so what did not stay is written over by the next step.
    """

    def __init__(self, backbone: Backbone, requests: Sequence[Request]) -> None:
        device = next(backbone.parameters()).device
        token_ids, rows = pad_sources([request.token_ids for request in requests], device)
        memory = backbone.encode(token_ids, rows.padding_mask)
        self._cohort = backbone.init_cache(memory, rows.padding_mask)  # for its cross-attention
        self._tables = backbone.position_tables()
        self._last_position = (backbone.max_target_length or 2**31) - 1
        self._device = device
        self._buffers: list[tuple[Tensor, Tensor]] = []  # each layer's keys and values, [R, H, C, K]
        self.lengths = [0] * len(requests)
        self.begin(1)
        self._positions: Tensor
        self._biases: list[Tensor]  # one, or one a layer: bool [R, 1, W, L] or what is added, [R, H, W, L]

    def begin(self, width: int) -> None:
        """The next step feeds so many tokens to each row."""
        self._width = self._cohort.width = width
        self._cross = DecoderCache([self._cohort])

    @property
    def num_tokens(self) -> int:
        """N of the next step."""
        return len(self.lengths) * self._width

    def begin_step(self) -> None:
        """See StepCache."""
        end = max(self.lengths) + self._width
        if self._buffers and self._buffers[0][0].shape[2] < end:
            more = (0, 0, 0, max(_GROWTH, end))
            self._buffers = [(F.pad(keys, more), F.pad(values, more)) for keys, values in self._buffers]
        lengths = torch.tensor(self.lengths, device=self._device)
        self._positions = lengths[:, None] + torch.arange(self._width, device=self._device)
        distance = self._positions[..., None] - torch.arange(end, device=self._device)
        seen = (distance >= 0)[:, None]
        self._biases = [seen]
        if self._tables is not None:
            near = distance.clamp(0, self._tables.shape[-1] - 1)
            self._biases = [t[:, near].transpose(0, 1).masked_fill(~seen, float("-inf")) for t in self._tables]

    def end_step(self) -> None:
        """See StepCache."""

    def positions(self, device: torch.device) -> Tensor:
        """See StepCache. Beyond the last position there are only guesses that cannot count."""
        return self._positions.flatten().clamp(max=self._last_position)

    def attend_self(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See StepCache: query, key, value `[N, D]` to `[N, D]`."""
        query_, key, value = (
            x.view(len(self.lengths), self._width, self._cohort.num_heads, -1) for x in (query, key, value)
        )
        end = max(self.lengths) + self._width
        if layer == len(self._buffers):
            rows, _, heads, size = key.shape
            shape = (rows, heads, end + _GROWTH, size)
            self._buffers.append((key.new_zeros(shape), key.new_zeros(shape)))
        keys, values = self._buffers[layer]
        every = torch.arange(len(self.lengths), device=self._device)[:, None]
        keys[every, :, self._positions] = key
        values[every, :, self._positions] = value
        bias = self._biases[layer % len(self._biases)]
        out = F.scaled_dot_product_attention(
            query_.transpose(1, 2),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=bias if bias.dtype == torch.bool else bias.to(query.dtype),
            scale=self._cohort.scale,
        )
        return out.transpose(1, 2).reshape(query.shape)

    def attend_cross(self, layer: int, query: Tensor) -> Tensor:
        """See StepCache."""
        return self._cross.attend_cross(layer, query)

    def accept(self, counts: Sequence[int]) -> None:
        """So many of the tokens fed to each row stay."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, order: list[int]) -> None:
        """Row i becomes what row `order[i]` was; the others go. See `closing_order`."""
        self._cohort.keep(order)
        index = torch.tensor(order, device=self._device)
        self.lengths = [self.lengths[row] for row in order]
        self._buffers = [(keys[index], values[index]) for keys, values in self._buffers]


class ChainCaches:
    """The StepCache of several cohorts at once: every linear layer runs over all of their tokens together."""

    def __init__(self, caches: Sequence[ChainCache]) -> None:
        self._caches = caches
        self._sizes = [cache.num_tokens for cache in caches]

    def begin_step(self) -> None:
        """See StepCache."""
        for cache in self._caches:
            cache.begin_step()

    def end_step(self) -> None:
        """See StepCache."""

    def positions(self, device: torch.device) -> Tensor:
        """See StepCache."""
        return torch.cat([cache.positions(device) for cache in self._caches])

    def attend_self(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See StepCache."""
        parts = zip(self._caches, *(x.split(self._sizes) for x in (query, key, value)), strict=True)
        return torch.cat([cache.attend_self(layer, q, k, v) for cache, q, k, v in parts])

    def attend_cross(self, layer: int, query: Tensor) -> Tensor:
        """See StepCache."""
        parts = zip(self._caches, query.split(self._sizes), strict=True)
        return torch.cat([cache.attend_cross(layer, q) for cache, q in parts])


class Draft(Protocol):
    """Guesses for the rows of one cohort."""

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Tokens that may follow each row's text (start token included): its prompt's, as long as it is read, then any
        number of guesses, none too.
        """
        ...

    def accept(self, counts: Sequence[int]) -> None:
        """So many tokens were added to each row since."""
        ...

    def keep(self, order: list[int]) -> None:
        """As ChainCache's."""
        ...


class SourceDraft:
    """Draft-free: what follows the text's last tokens where they stand in the row's own source (prompt lookup, Saxena
    2023), three of them, else two, else one. Summaries copy.
    """

    def __init__(self, requests: Sequence[Request], count: int) -> None:
        self._count = count
        self._prompts = [list(request.prompt_ids) for request in requests]
        self._sources = [[int(token) for token in request.token_ids] for request in requests]
        self._places = [_places(source) for source in self._sources]

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        found = []
        for text, prompt, source, places in zip(texts, self._prompts, self._sources, self._places, strict=True):
            if len(text) <= len(prompt):
                found.append(prompt[len(text) - 1 :][: self._count])
                continue
            sizes = range(min(_LONGEST_NGRAM, len(text)), 0, -1)
            at = next((places[tail] for n in sizes if (tail := tuple(text[-n:])) in places), len(source))
            found.append(source[at : at + self._count])
        return found

    def accept(self, counts: Sequence[int]) -> None:
        pass

    def keep(self, order: list[int]) -> None:
        self._prompts = [self._prompts[row] for row in order]
        self._sources = [self._sources[row] for row in order]
        self._places = [self._places[row] for row in order]


def _places(source: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Where the text goes on after each n-gram's first occurrence."""
    places: dict[tuple[int, ...], int] = {}
    for n in range(1, _LONGEST_NGRAM + 1):
        for end in range(n, len(source)):
            places.setdefault(tuple(source[end - n : end]), end)
    return places


class ModelDraft:
    """A smaller model's greedy tokens. Its cache is one token ahead of its last guess, so it needs no catching up."""

    def __init__(self, backbone: Backbone, requests: Sequence[Request], count: int) -> None:
        self._backbone = backbone
        self._count = count
        self._prompts = [list(request.prompt_ids) for request in requests]
        self._cache = ChainCache(backbone, requests)
        self._device = next(backbone.parameters()).device

    def propose(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        guesses: list[list[int]] = [[] for _ in texts]
        last = [text[-1] for text in texts]
        before = self._cache.lengths
        for _ in range(self._count + 1):
            self._cache.begin(1)
            logits = self._backbone.decode(torch.tensor(last, device=self._device), self._cache)
            self._cache.accept([1] * len(texts))
            last = selection.best(logits, 1, normaliser=False)[1].flatten().tolist()
            for row, (text, prompt) in enumerate(zip(texts, self._prompts, strict=True)):
                place = len(text) - 1 + len(guesses[row])  # in the prompt, which is not guessed
                last[row] = prompt[place] if place < len(prompt) else last[row]
                guesses[row].append(last[row])
        self._cache.lengths = before
        return [guess[: self._count] for guess in guesses]

    def accept(self, counts: Sequence[int]) -> None:
        self._cache.accept(counts)

    def keep(self, order: list[int]) -> None:
        self._cache.keep(order)
        self._prompts = [self._prompts[row] for row in order]
