"""Samplers: how scores become the next token. None of them owns a loop.

The names and defaults are KerasHub's (`keras_hub.samplers`). A built-in sampler is a set of generation settings, which
the engine applies to all rows at once; a subclass that overrides `get_next_token` is called with the probabilities
instead.

Dimensions: N sequences, V vocabulary, C candidates.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from s2s_ray import kernels
from s2s_ray.errors import SettingsError
from s2s_ray.generation import selection
from s2s_ray.generation.settings import GenerationSettings


class Sampler:
    """Base class. To add one: subclass, override `get_next_token`, pass an instance to `compile(sampler=...)`.

    temperature: divides the scores before the softmax; above 0. seed: int, or None for 0.
    """

    name: ClassVar[str] = ""

    def __init__(self, temperature: float = 1.0, *, seed: int | None = None) -> None:
        self.temperature = temperature
        self.seed = seed
        GenerationSettings(temperature=temperature, seed=seed or 0)  # checks both

    def get_next_token(self, probabilities: Tensor) -> Tensor:
        """probabilities fp32 `[N, V]` to tokens int64 `[N]`."""
        raise NotImplementedError(f"{type(self).__name__} must override get_next_token(probabilities)")

    def settings(self) -> dict[str, Any]:
        """The generation settings this sampler stands for."""
        base = {"temperature": self.temperature, "num_beams": 1, "penalty_alpha": 0.0}
        return base | ({} if self.seed is None else {"seed": self.seed})

    @property
    def is_custom(self) -> bool:
        """Whether `get_next_token` was overridden outside this module, so that the engine must call it."""
        return type(self).get_next_token.__module__ != __name__

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"temperature": self.temperature, "seed": self.seed}


class GreedySampler(Sampler):
    """The most probable token."""

    name = "greedy"

    def get_next_token(self, probabilities: Tensor) -> Tensor:
        """probabilities fp32 `[N, V]` to tokens int64 `[N]`."""
        return probabilities.argmax(dim=-1)

    def settings(self) -> dict[str, Any]:
        """Greedy: no sampling, one beam."""
        return super().settings() | {"do_sample": False}


class RandomSampler(Sampler):
    """A draw from the whole distribution."""

    name = "random"

    def get_next_token(self, probabilities: Tensor) -> Tensor:
        """probabilities fp32 `[N, V]` to tokens int64 `[N]`, drawn with torch's generator."""
        settings = GenerationSettings(**self.settings())
        draws = torch.rand(probabilities.shape[0], dtype=torch.float64, device=probabilities.device)
        return Warpers([settings] * probabilities.shape[0], probabilities.device).sample(probabilities.log(), draws)

    def settings(self) -> dict[str, Any]:
        """Sampling with every filter off."""
        return super().settings() | {"do_sample": True, "top_k": 0, "top_p": 1.0}


class TopKSampler(RandomSampler):
    """A draw from the `k` most probable tokens."""

    name = "top_k"

    def __init__(self, k: int = 5, seed: int | None = None, *, temperature: float = 1.0) -> None:
        super().__init__(temperature, seed=seed)
        self.k = k
        GenerationSettings(top_k=k)

    def settings(self) -> dict[str, Any]:
        """Sampling from the top k."""
        return super().settings() | {"top_k": self.k}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"k": self.k}


class TopPSampler(RandomSampler):
    """A draw from the fewest tokens whose probabilities reach `p`, after an optional cut to the `k` most probable."""

    name = "top_p"

    def __init__(
        self, p: float = 0.1, k: int | None = None, seed: int | None = None, *, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature, seed=seed)
        self.p = p
        self.k = k
        GenerationSettings(top_p=p, top_k=k or 0)

    def settings(self) -> dict[str, Any]:
        """Sampling from the nucleus."""
        return super().settings() | {"top_p": self.p, "top_k": self.k or 0}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"p": self.p, "k": self.k}


class BeamSampler(GreedySampler):
    """Beam search over `num_beams` sequences a row, scored as transformers does."""

    name = "beam"

    def __init__(self, num_beams: int = 5, *, temperature: float = 1.0, seed: int | None = None) -> None:
        super().__init__(temperature, seed=seed)
        self.num_beams = num_beams
        GenerationSettings(num_beams=num_beams)

    def settings(self) -> dict[str, Any]:
        """Beam search."""
        return super().settings() | {"num_beams": self.num_beams}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"num_beams": self.num_beams}


class ContrastiveSampler(Sampler):
    """Contrastive search: of the `k` most probable tokens the one that is likely and, by `alpha` (0 to 1), unlike what
    was said before. It needs the decoder's hidden states, so there is no `get_next_token`.
    """

    name = "contrastive"

    def __init__(self, k: int = 5, alpha: float = 0.6, *, temperature: float = 1.0, seed: int | None = None) -> None:
        super().__init__(temperature, seed=seed)
        self.k = k
        self.alpha = alpha
        GenerationSettings(top_k=k, penalty_alpha=alpha)

    def settings(self) -> dict[str, Any]:
        """Contrastive search."""
        return super().settings() | {"do_sample": False, "top_k": self.k, "penalty_alpha": self.alpha}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"k": self.k, "alpha": self.alpha}


class SpeculativeSampler(GreedySampler):
    """Greedy search, several tokens a step: up to `num_speculative_tokens` guesses are verified at once.

    draft: who guesses, a smaller `Seq2SeqLM` of the same vocabulary or its preset; None looks the text's last tokens up
    in the row's source. Faster only with few rows at a time (docs/performance.md), so nothing uses it by itself.
    """

    name = "speculative"

    def __init__(self, num_speculative_tokens: int = 5, draft: Any = None, *, seed: int | None = None) -> None:
        super().__init__(seed=seed)
        if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int):
            raise SettingsError(f"num_speculative_tokens must be a whole number. Received: {num_speculative_tokens!r}")
        self.num_speculative_tokens = num_speculative_tokens
        self.draft = draft

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_speculative_tokens": self.num_speculative_tokens,
            "draft": self.draft,
            "seed": self.seed,
        }


_CLASSES = (
    GreedySampler,
    RandomSampler,
    TopKSampler,
    TopPSampler,
    BeamSampler,
    ContrastiveSampler,
    SpeculativeSampler,
)
_SAMPLERS: dict[str, type[Any]] = {cls.name: cls for cls in _CLASSES}


def names() -> list[str]:
    """The names `get` knows."""
    return sorted(_SAMPLERS)


def get(identifier: "str | Sampler | dict[str, Any] | type[Sampler]") -> Sampler:
    """A sampler from its name, class, instance, or `{"class_name": name, "config": {...}}`. Raises SettingsError."""
    if isinstance(identifier, Sampler):
        return identifier
    if isinstance(identifier, type) and issubclass(identifier, Sampler):
        return identifier()
    if isinstance(identifier, dict) and identifier.get("class_name") in _SAMPLERS:
        try:
            return _SAMPLERS[identifier["class_name"]](**identifier.get("config", {}))
        except TypeError as error:
            raise SettingsError(f"sampler {identifier['class_name']!r}: {error}") from error
    if isinstance(identifier, str) and identifier in _SAMPLERS:
        return _SAMPLERS[identifier]()
    raise SettingsError(f"sampler must be one of {', '.join(names())}, or a Sampler. Received: {identifier!r}")


class Warpers:
    """Temperature and the filters of sampling for a set of sequences, each with its own values.

    The order and meaning are transformers': temperature, top-k, top-p, min-p, typical-p (Meister et al. 2022).
    """

    def __init__(self, settings: Sequence[GenerationSettings], device: torch.device) -> None:
        """One entry per sequence; those that do not sample pass through unchanged."""

        def column(name: str) -> Tensor | None:
            values = [getattr(s, name) if s.do_sample else _NEUTRAL[name] for s in settings]
            if all(v == _NEUTRAL[name] for v in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._temperature = column("temperature")
        self._top_k = column("top_k")
        self._top_p = column("top_p")
        self._min_p = column("min_p")
        self._typical_p = column("typical_p")
        ks = [s.top_k if s.do_sample else 0 for s in settings]
        # transformers keeps enough candidates for every beam to go on when it samples beams.
        least = [len(s.eos_token_id) + 1 if s.num_beams > 1 else 1 for s in settings]
        self._keep = torch.tensor(least, device=device)[:, None]
        self._candidates = max(*ks, *least) if min(ks) > 0 else None

    def filtered(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores `[N, V]` to (scores fp32, token ids), `[N, C]` each, best first, what is filtered out at -inf."""
        count = min(self._candidates or scores.shape[1], scores.shape[1])
        scores, ids = selection.top(scores, count)
        scores = scores.float()
        if self._temperature is not None:
            scores = scores / self._temperature
        spare = torch.arange(count, device=scores.device) >= self._keep  # may be filtered out
        if self._top_k is not None:
            rank = torch.arange(count, device=scores.device)
            scores = scores.masked_fill(spare & (rank >= self._top_k) & (self._top_k > 0), float("-inf"))
        if self._top_p is not None:
            probabilities = scores.softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            scores = scores.masked_fill(spare & (before >= self._top_p) & (self._top_p < 1.0), float("-inf"))
        if self._min_p is not None:
            probabilities = scores.softmax(dim=-1)
            scores = scores.masked_fill(spare & (probabilities < self._min_p * probabilities[:, :1]), float("-inf"))
        if self._typical_p is not None:
            scores = _typical(scores, self._typical_p, self._keep)
        return scores, ids

    def sample(self, scores: Tensor, draws: Tensor) -> Tensor:
        """scores `[N, V]` and draws fp64 `[N]` in [0, 1) to tokens int64 `[N]`, by the inverse of the cumulative
        sum.
        """
        scores, ids = self.filtered(scores)
        cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
        chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
        last = (scores > float("-inf")).sum(dim=-1, keepdim=True).clamp(min=1) - 1
        if self._typical_p is not None:  # its survivors need not be a prefix of the candidates
            last = torch.full_like(last, scores.shape[1] - 1)
        return ids.gather(1, torch.minimum(chosen, last)).squeeze(1)


class Nucleus:
    """As Warpers, of sequences with temperature and top-p alone: on a GPU nothing is sorted for them."""

    def __init__(self, settings: Sequence[GenerationSettings], device: torch.device) -> None:
        """One entry per sequence, each of which `suits`."""
        self._temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self._top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device)

    @staticmethod
    def suits(settings: GenerationSettings, device: torch.device) -> bool:
        """Whether these settings are sampled here."""
        filters = ("top_k", "min_p", "typical_p")
        alone = all(getattr(settings, name) == _NEUTRAL[name] for name in filters)
        return alone and kernels.load("sampling", device) is not None

    def sample(self, scores: Tensor, draws: Tensor) -> Tensor:
        """As `Warpers.sample`; tokens of one score come by their ids."""
        kernel: Any = kernels.load("sampling", scores.device)
        tokens: Tensor = kernel.sample(scores.contiguous(), self._temperature, self._top_p, draws)
        return tokens


_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def _typical(scores: Tensor, mass: Tensor, keep: Tensor) -> Tensor:
    log_probabilities = scores.log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    entropy = -(log_probabilities * probabilities).nansum(dim=-1, keepdim=True)
    distance = (-log_probabilities - entropy).abs()
    order = distance.argsort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(dim=-1)
    spare = torch.arange(scores.shape[1], device=scores.device) >= keep
    beyond = spare & (reached - probabilities.gather(1, order) >= mass) & (mass < 1.0)
    return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
