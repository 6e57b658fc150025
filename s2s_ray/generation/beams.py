"""Beam search.

Dimensions: R rows, W beams, N = R x W, C candidates, L history capacity, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2s_ray.generation import selection
from s2s_ray.generation.random import uniform
from s2s_ray.generation.requests import Request
from s2s_ray.generation.samplers import Warpers
from s2s_ray.generation.search import Search
from s2s_ray.generation.settings import GenerationSettings

_IMPOSSIBLE = -1.0e9  # transformers' score of a beam that may not win


class BeamSearch(Search):
    """Beam search with transformers' rules (`generation/utils.py`, `_beam_search`), every decision taken per row."""

    def _state(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        shape = (len(requests), self.width)
        score = torch.full(shape, _IMPOSSIBLE)
        score[:, 0] = 0.0
        settings = [r.settings for r in requests]
        return {
            "score": score,
            "best_tokens": torch.zeros(*shape, self._capacity, dtype=torch.int64),
            "best_score": torch.full(shape, _IMPOSSIBLE),
            "best_length": torch.ones(shape, dtype=torch.int64),
            "ended": torch.zeros(shape, dtype=torch.bool),
            "improvable": torch.ones(len(requests), dtype=torch.bool),
            "length_penalty": torch.tensor([s.length_penalty for s in settings], dtype=torch.float32),
            "stop_when_full": torch.tensor([s.early_stopping is True for s in settings]),
            "bound_by_limit": torch.tensor([s.early_stopping == "never" and s.length_penalty > 0 for s in settings]),
        }

    def _tables(self) -> None:
        super()._tables()
        stops = max(len(r.settings.eos_token_id) for r in self.requests) if self.requests else 0
        self._candidates = max(2, 1 + stops) * self.width
        self._sampled = torch.tensor([r.settings.do_sample for r in self.requests], device=self.device)
        settings = [r.settings for r in self.requests for _ in range(self.width)]
        self._warpers = Warpers(settings, self.device) if any(s.do_sample for s in settings) else None

    def needs(self) -> tuple[int, bool] | None:
        return None if self._constraints or self._warpers is not None else (self._candidates, True)

    def _advance(self, logits: Any, states: Tensor) -> Tensor:
        rows, width = len(self.requests), self.width
        reading, prompt = self._forced()
        total, parents, tokens = self._best_candidates(logits)
        stops = (tokens[..., None] == self.row["stops"][:, None]).any(dim=-1)
        stops |= (self.row["length"] + 1 >= self.row["limit"])[:, None]
        self._finish(total, parents, tokens, stops & ~reading[:, None])
        ranked = (total + stops * _IMPOSSIBLE).topk(width, dim=1)
        chosen = ranked.indices
        parents, tokens = parents.gather(1, chosen), tokens.gather(1, chosen)
        identity = torch.arange(width, device=self.device).expand(rows, -1)
        parents = torch.where(reading[:, None], identity, parents)
        tokens = torch.where(reading[:, None], prompt, tokens)
        self.row["score"] = torch.where(reading[:, None], self.row["score"], ranked.values)
        history = self.row["tokens"].gather(1, parents[:, :, None].expand_as(self.row["tokens"]))
        self.row["tokens"] = history.scatter(
            2, self.row["length"][:, None, None].expand(-1, width, 1), tokens[..., None]
        )
        self.row["nonfinite"] |= ~(total[:, 0] < float("inf")) & ~self.row["done"]
        self._judge(reading, stops)
        return parents

    def _best_candidates(self, logits: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of each row: total score, parent beam, token, `[R, C]` each, best first."""
        rows, needs = len(self.requests), self.needs()
        candidates = self._candidates if isinstance(logits, tuple) else min(self._candidates, logits.shape[1])
        if needs is not None:
            best, tokens, normaliser = selection.best(logits, candidates, normaliser=True)
            best = best - normaliser[:, None]  # type: ignore[index]
        else:
            scores = logits.float().log_softmax(dim=-1)
            self._constraints.apply(scores, self._history())
            if self._warpers is not None:
                best, tokens = self._warpers.filtered(scores)
            else:  # the C best of a row are among the C best of each of its beams, which spares a sort over W x V
                best, tokens, _ = selection.best(scores, candidates, normaliser=False)
        count = best.shape[1]
        tokens = tokens.view(rows, -1)
        total = (best.view(rows, self.width, count) + self.row["score"][:, :, None]).flatten(1)
        rank = total if self._warpers is None else total + self._noise(tokens)
        chosen = rank.topk(min(self._candidates, total.shape[1]), dim=1).indices
        return total.gather(1, chosen), chosen // count, tokens.gather(1, chosen)

    def _noise(self, tokens: Tensor) -> Tensor:
        """Gumbel noise for rows that sample: the C best of noisy log-probabilities are C draws without replacement."""
        beam = torch.arange(tokens.shape[1], device=self.device) // (tokens.shape[1] // self.width)
        step = (self.row["length"] - self.row["prompt_length"])[:, None]
        draws = uniform(self.row["seed"][:, None], self.row["row_id"][:, None], step, (beam << 32) + tokens)
        gumbel = -(-draws.clamp(min=1e-300).log()).log()
        return gumbel.float() * self._sampled[:, None]

    def _finish(self, total: Tensor, parents: Tensor, tokens: Tensor, stops: Tensor) -> None:
        """Keep the best ended hypotheses of each row; only its `width` best candidates may end."""
        row, width = self.row, self.width
        length = row["length"]
        ending = stops[:, :width]
        generated = (length + 1 - row["prompt_length"]).clamp(min=1).float()
        score = total[:, :width] / (generated ** row["length_penalty"])[:, None]
        full = row["ended"].all(dim=1) & row["stop_when_full"]
        closed = full | ~row["improvable"] | row["done"]
        score = score + closed[:, None] * _IMPOSSIBLE + ~ending * _IMPOSSIBLE
        index = parents[:, :width, None].expand(-1, -1, row["tokens"].shape[2])
        histories = row["tokens"].gather(1, index)
        at = length[:, None, None].expand(-1, width, 1)
        histories = histories.scatter(2, at, tokens[:, :width, None])
        pool = torch.cat((row["best_tokens"], histories), dim=1)
        best_score, chosen = torch.cat((row["best_score"], score), dim=1).topk(width, dim=1)
        row["best_score"] = best_score
        row["best_tokens"] = pool.gather(1, chosen[:, :, None].expand(-1, -1, pool.shape[2]))
        row["best_length"] = torch.cat((row["best_length"], (length + 1)[:, None].expand(-1, width)), dim=1).gather(
            1, chosen
        )
        row["ended"] = torch.cat((row["ended"], ending), dim=1).gather(1, chosen)

    def _judge(self, reading: Tensor, stops: Tensor) -> None:
        """Decide which rows are done: full, beyond improvement, or without a way to go on."""
        row = self.row
        now = row["length"] + 1 - row["prompt_length"]
        horizon = torch.where(row["bound_by_limit"], row["limit"] - row["prompt_length"], now).clamp(min=1).float()
        possible = row["score"][:, 0] / horizon ** row["length_penalty"]
        worst = torch.where(row["ended"], row["best_score"].amin(dim=1, keepdim=True), _IMPOSSIBLE)
        row["improvable"] &= reading | (possible[:, None] > worst).any(dim=1)
        full = row["ended"].all(dim=1) & row["stop_when_full"]
        over = ~row["improvable"] | full | stops.all(dim=1)
        row["done"] |= (over & ~reading) | row["nonfinite"]

    def _scores_known(self, settings: GenerationSettings) -> bool:
        return True

    def _outputs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.row["best_tokens"][index], self.row["best_length"][index], self.row["best_score"][index]
