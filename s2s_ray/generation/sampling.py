"""Greedy search and sampling.

Dimensions: R rows, W width (parallel samples of a row), N = R x W, L history capacity, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2s_ray.generation import selection
from s2s_ray.generation.random import uniform
from s2s_ray.generation.requests import Request
from s2s_ray.generation.samplers import Nucleus, Sampler, Warpers
from s2s_ray.generation.search import Search
from s2s_ray.nn.ragged import to_device


class SampleSearch(Search):
    """Greedy search and sampling: each sequence goes its own way."""

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        width: int,
        device: torch.device,
        sampler: Sampler | None,
    ) -> None:
        self._sampler = sampler
        super().__init__(requests, limits, width, device)

    def _state(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        shape = (len(requests), self.width)
        return {
            "score": torch.zeros(shape),
            "ended": torch.zeros(shape, dtype=torch.bool),
            "final_length": torch.ones(shape, dtype=torch.int64),
            "pad": torch.tensor([r.settings.pad_token_id for r in requests]),
        }

    def _tables(self) -> None:
        super()._tables()
        self._scored = any(r.settings.output_scores for r in self.requests)
        drawn: dict[type[Warpers | Nucleus], list[int]] = {}
        for row, r in enumerate(self.requests):
            if r.settings.do_sample:
                kind = Nucleus if Nucleus.suits(r.settings, self.device) else Warpers
                drawn.setdefault(kind, []).extend(range(row * self.width, (row + 1) * self.width))
        self._drawn = [self._draw_by(kind, sequences) for kind, sequences in drawn.items()]

    def _draw_by(self, kind: type[Warpers | Nucleus], sequences: list[int]) -> tuple[Tensor | slice, Warpers | Nucleus]:
        settings = [self.requests[n // self.width].settings for n in sequences]
        every = len(sequences) == self.num_sequences
        index = slice(None) if every else to_device(torch.tensor(sequences), self.device)
        return index, kind(settings, self.device)

    def needs(self) -> tuple[int, bool] | None:
        whole = self._constraints or self._drawn or self._sampler is not None or self._scored
        return None if whole else (1, False)

    def _advance(self, logits: Any, states: Tensor) -> None:
        shape = (len(self.requests), self.width)
        raw = logits
        if self._constraints:
            dtype = torch.float32 if self._constraints.rescales else logits.dtype
            logits = logits.to(dtype, copy=self._scored)
            self._constraints.apply(logits, self._history())
        best, tokens, _ = selection.best(logits, 1, normaliser=False)
        tokens = tokens.squeeze(1)
        if self._sampler is not None:
            tokens = self._sampler.get_next_token((logits.float() / self._sampler.temperature).softmax(dim=-1)).to(
                tokens
            )
        else:
            for index, sampling in self._drawn:
                tokens[index] = sampling.sample(logits[index], self._draws()[index])
        tokens = tokens.view(shape)
        reading, prompt = self._forced()
        tokens = torch.where(reading[:, None], prompt, tokens)
        ended = self.row["ended"]
        if self._scored:
            gained = raw.gather(1, tokens.view(-1, 1)).squeeze(1).float() - raw.float().logsumexp(dim=-1)
            self.row["score"] += gained.view(shape).masked_fill(reading[:, None] | ended, 0.0)
        self.row["nonfinite"] |= ~(best < float("inf")).view(shape).all(dim=1) & ~self.row["done"]
        self._write(tokens, reading, ended)
        self.row["done"] |= self.row["nonfinite"]

    def _write(self, tokens: Tensor, reading: Tensor, ended: Tensor) -> None:
        length = self.row["length"]
        tokens = torch.where(ended, self.row["pad"][:, None], tokens)
        self.row["tokens"].scatter_(2, length[:, None, None].expand(-1, self.width, 1), tokens[..., None])
        self.row["final_length"] += ~ended
        stops = (tokens[..., None] == self.row["stops"][:, None]).any(dim=-1) & ~reading[:, None]
        self.row["ended"] = ended | stops | (length + 1 >= self.row["limit"])[:, None]
        self.row["done"] |= self.row["ended"].all(dim=1)

    def _draws(self) -> Tensor:
        step = self.row["length"] - self.row["prompt_length"]
        lane = torch.arange(self.width, device=self.device)
        row_id, seed = self.row["row_id"], self.row["seed"]
        return uniform(seed[:, None], row_id[:, None], step[:, None], lane[None]).flatten()

    def _outputs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.row["tokens"][index], self.row["final_length"][index], self.row["score"][index]
