"""Contrastive search (Su et al. 2022, arXiv:2202.06417): probable tokens that do not repeat what the text says already.

The k most probable tokens of a row are its W sequences of one step: each is decoded, and the one is kept whose
probability, less its likeness to any earlier position of the row, is greatest. A token costs as much as with k beams,
and n tokens take n + 1 steps.

Dimensions: R rows, W candidates, N = R x W, D hidden width, L history capacity, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from s2s_ray.generation import selection
from s2s_ray.generation.constraints import Constraints, History
from s2s_ray.generation.requests import Request
from s2s_ray.generation.search import Search


class ContrastiveSearch(Search):
    """Rows of k candidates each. The likeness of two positions is the cosine of the decoder's last hidden states.

    Unlike transformers' recipe, a token that a constraint rules out is never chosen, however unlike the others it is.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        width: int,
        device: torch.device,
        hidden_dim: int,
    ) -> None:
        self._hidden_dim = hidden_dim
        super().__init__(requests, limits, width, device)

    def _state(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        rows, settings = len(requests), [r.settings for r in requests]
        return {
            "states": torch.zeros(rows, self._hidden_dim, self._capacity),  # of length 1
            "probability": torch.ones(rows, self.width),  # of the candidates; -inf for those that may not be chosen
            "gain": torch.zeros(rows, self.width),  # their log-probability by the model alone
            "score": torch.zeros(rows),
            "final_length": torch.ones(rows, dtype=torch.int64),
            "alpha": torch.tensor([s.penalty_alpha for s in settings])[:, None],
            "temperature": torch.tensor([s.temperature for s in settings])[:, None],
        }

    def _tables(self) -> None:
        self._constraints = Constraints(self.requests, self.prompt_lengths, self.limits, 1, self.device)

    def _resize(self, capacity: int) -> None:
        super()._resize(capacity)
        self.row["states"] = F.pad(self.row["states"], (0, capacity - self.row["states"].shape[2]))

    def _advance(self, logits: Tensor, states: Tensor) -> Tensor:
        chosen = self._choose(F.normalize(states.float(), dim=-1).unflatten(0, (-1, self.width)))
        self._settle(chosen)
        every = torch.arange(len(chosen), device=self.device)
        self._propose(logits.unflatten(0, (-1, self.width))[every, chosen])
        return chosen[:, None].expand(-1, self.width)

    def _choose(self, states: Tensor) -> Tensor:
        """Which candidate of each row stays, int64 `[R]`; its token and its state enter the history."""
        row, newest = self.row, self.row["length"] - 1
        earlier = torch.arange(self.longest, device=self.device) < newest[:, None]
        likeness = torch.bmm(states, row["states"][:, :, : self.longest])
        likeness = likeness.masked_fill(~earlier[:, None], -1.0).amax(dim=2)
        score = (1 - row["alpha"]) * row["probability"] - row["alpha"] * likeness
        chosen = score.masked_fill(row["probability"] < 0, float("-inf")).argmax(dim=1)
        at = newest[:, None, None]
        token = row["tokens"].gather(2, at.expand(-1, self.width, 1)).squeeze(2).gather(1, chosen[:, None])
        row["tokens"].scatter_(2, at.expand(-1, self.width, 1), token[..., None].expand(-1, self.width, 1))
        state = states[torch.arange(len(chosen), device=self.device), chosen]
        row["states"].scatter_(2, at.expand(-1, self._hidden_dim, 1), state[..., None])
        return chosen

    def _settle(self, chosen: Tensor) -> None:
        """Take the chosen token into account: the row's score, and whether it is done."""
        row, length = self.row, self.row["length"]
        token = row["tokens"][:, 0].gather(1, (length - 1)[:, None])
        generated = length > row["prompt_length"]
        gained = row["gain"].gather(1, chosen[:, None]).squeeze(1)
        row["score"] = row["score"] + gained.masked_fill(row["done"] | ~generated, 0.0)
        row["final_length"] = torch.where(row["done"], row["final_length"], length)
        stops = (token == row["stops"]).any(dim=1) & generated
        row["done"] = row["done"] | stops | (length >= row["limit"])

    def _propose(self, logits: Tensor) -> None:
        """The next candidates of each row, from the logits `[R, V]` of its chosen token."""
        row, length = self.row, self.row["length"]
        scores = logits.to(torch.float32, copy=True)
        self._constraints.apply(scores, History(row["tokens"][:, 0, : self.longest], length))
        scores /= row["temperature"]
        best, tokens, normaliser = selection.best(scores, self.width, normaliser=True)
        probability = (best - normaliser[:, None]).exp().masked_fill(best == float("-inf"), float("-inf"))  # type: ignore[index]
        at = length.clamp(max=row["tokens"].shape[2] - 1)[:, None, None].expand(-1, self.width, 1)
        reading = (length < row["prompt_length"])[:, None]
        tokens = torch.where(reading, row["tokens"].gather(2, at).squeeze(2), tokens)
        row["tokens"].scatter_(2, at, tokens[..., None])
        row["probability"] = probability.masked_fill(reading, 1.0)
        row["gain"] = logits.gather(1, tokens).float() - logits.float().logsumexp(dim=1, keepdim=True)
        row["nonfinite"] = row["nonfinite"] | (~(best[:, 0] < float("inf")) & ~row["done"])
        row["done"] = row["done"] | row["nonfinite"]

    def _outputs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = self.row
        return row["tokens"][index, :1], row["final_length"][index, None], row["score"][index, None]
