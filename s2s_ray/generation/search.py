"""The state of the rows being decoded, whichever way scores move it on: `sampling.py` (greedy search included),
`beams.py`, `contrastive.py`.

A search holds rows of one width. All of it lives on the device; nothing here waits for the device but `collect`.

Dimensions: R rows, W width (beams, or parallel samples of a row), N = R x W, L history capacity, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2s_ray.errors import RowErrorReason
from s2s_ray.generation import selection
from s2s_ray.generation.constraints import Constraints, History
from s2s_ray.generation.requests import Finished, Generated, Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.nn.ragged import all_to_device, to_device

_CAPACITY = 32  # tokens of history; doubles when full
_HELD_STOPS = 8  # stop tokens a row may have where the state stays in place


class Search(ABC):
    """Rows of one width: their histories, limits and settings, and which of them are done."""

    def __init__(self, requests: Sequence[Request], limits: Sequence[int], width: int, device: torch.device) -> None:
        """limits: the longest history (start token and prompt included) each row may reach."""
        self.requests = list(requests)
        self.limits = list(limits)
        self.width = width
        self.device = device
        self.prompt_lengths = [1 + len(r.prompt_ids) for r in requests]
        self._clock = 0
        self._held = False
        self._born = [0] * len(requests)
        self._capacity = max(_CAPACITY, max(self.prompt_lengths) + 1)
        self.row: dict[str, Tensor] = self._initial(requests, limits)
        self._tables()

    def _initial(self, requests: Sequence[Request], limits: Sequence[int]) -> dict[str, Tensor]:
        rows = len(requests)
        prompts = [[r.settings.decoder_start_token_id, *r.prompt_ids] for r in requests]
        longest = max(len(p) for p in prompts)
        tokens = torch.zeros(rows, self.width, self._capacity, dtype=torch.int64)
        tokens[:, :, :longest] = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts])[:, None]
        stops = [r.settings.eos_token_id or (-1,) for r in requests]
        most = max(len(s) for s in stops)
        state = {
            "tokens": tokens,
            "length": torch.ones(rows, dtype=torch.int64),
            "prompt_length": torch.tensor([len(p) for p in prompts]),
            "limit": torch.tensor(limits),
            "stops": torch.tensor([[*s, *[-1] * (most - len(s))] for s in stops]),
            "done": torch.zeros(rows, dtype=torch.bool),
            "nonfinite": torch.zeros(rows, dtype=torch.bool),
            "row_id": torch.tensor([r.row_id for r in requests]),
            "seed": torch.tensor([r.settings.seed for r in requests]),
        }
        return all_to_device(state | self._state(requests), self.device)

    @abstractmethod
    def _state(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """What the kind of search adds to the state of fresh rows."""

    def refresh(self) -> None:
        """Make the tables anew after rows with other settings were placed."""
        self._tables()

    def _tables(self) -> None:
        """Make whatever depends on which rows are present."""
        self._constraints = Constraints(self.requests, self.prompt_lengths, self.limits, self.width, self.device)

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.requests) * self.width

    @property
    def longest(self) -> int:
        """The longest history there can be now, in tokens."""
        return self._capacity if self._held else self._clock - min(self._born, default=self._clock) + 1

    def newest(self) -> Tensor:
        """The token each sequence feeds to the decoder now, int64 `[N]`."""
        index = (self.row["length"] - 1)[:, None, None].expand(-1, self.width, 1)
        return self.row["tokens"].gather(2, index).flatten()

    def needs(self) -> tuple[int, bool] | None:
        """How many of the best tokens, and whether the normaliser too, are all that the next step reads of the logits;
        None where it reads the whole of them.
        """
        return None

    def advance(self, logits: Tensor | selection.Best, states: Tensor) -> Tensor | None:
        """Choose the next token of every sequence from logits `[N, V]`, which may be written to, or from what `needs`
        asked for, and the hidden states `[N, D]` that they were made of.

        Returns the source sequence of each, int64 `[R, W]`, where histories moved between sequences; None where not.
        """
        self._reserve()
        alive = ~self.row["done"]
        parents = self._advance(logits, states)
        self.row["length"] += alive
        self._clock += 1
        return parents

    @abstractmethod
    def _advance(self, logits: Any, states: Tensor) -> Tensor | None: ...

    def _reserve(self) -> None:
        if not self._held and self._capacity <= self.longest:
            self._resize(2 * self._capacity)

    def _resize(self, capacity: int) -> None:
        for name in ("tokens", "best_tokens"):
            if name in self.row:
                self.row[name] = _widened(self.row[name], capacity, 0)
        self._capacity = capacity

    def _history(self) -> History:
        tokens = self.row["tokens"][:, :, : self.longest].flatten(0, 1)
        return History(tokens, self.row["length"].repeat_interleave(self.width))

    def _forced(self) -> tuple[Tensor, Tensor]:
        """Whether each row still reads its prompt, bool `[R]`, and the token at the next position, int64 `[R, W]`."""
        index = self.row["length"][:, None, None].expand(-1, self.width, 1)
        return self.row["length"] < self.row["prompt_length"], self.row["tokens"].gather(2, index).squeeze(2)

    def hold(self, capacity: int) -> None:
        """From now on the state stays where it is in memory, with room for `capacity` tokens, and rows come by `place`:
        what a captured step needs. No row is live yet.
        """
        self._resize(capacity)
        self._pad_stops(_HELD_STOPS)
        self.row["done"].fill_(True)
        self._held = True

    def place(self, rows: Sequence[int], requests: Sequence[Request], limits: Sequence[int]) -> None:
        """Put fresh rows into these places; the tables are left as they are (see `refresh`)."""
        index = to_device(torch.tensor(rows), self.device)
        fresh = self._initial(requests, limits)
        for name, tensor in self.row.items():
            new = fresh[name]
            if new.shape[1:] != tensor.shape[1:]:
                new = _widened(new, tensor.shape[-1], -1 if name == "stops" else 0)
            tensor.index_copy_(0, index, new)
        for row, request, limit in zip(rows, requests, limits, strict=True):
            self.requests[row], self.limits[row] = request, limit
            self.prompt_lengths[row] = 1 + len(request.prompt_ids)

    def advance_in_place(self, logits: Tensor, states: Tensor) -> Tensor | None:
        """As `advance`, for a search that was told to `hold`. Rows that are done stay as they are."""
        state = dict(self.row)
        alive = ~self.row["done"]
        parents = self.advance(logits, states)
        for name, tensor in state.items():
            if self.row[name] is not tensor:
                live = alive.view(-1, *[1] * (tensor.dim() - 1))
                torch.where(live, self.row[name], tensor, out=tensor)
        self.row = state
        return parents

    def _pad_stops(self, count: int) -> None:
        self.row["stops"] = _widened(self.row["stops"], count, -1)

    def join(self, other: Self) -> None:
        """Append the rows of another search of the same kind and width."""
        capacity = max(self._capacity, other._capacity)
        self._resize(capacity)
        other._resize(capacity)
        stops = max(self.row["stops"].shape[1], other.row["stops"].shape[1])
        self._pad_stops(stops)
        other._pad_stops(stops)
        self.row = {name: torch.cat((tensor, other.row[name])) for name, tensor in self.row.items()}
        self.requests += other.requests
        self.limits += other.limits
        self.prompt_lengths += other.prompt_lengths
        self._born += [self._clock - (other._clock - born) for born in other._born]
        self._tables()

    def keep(self, rows: list[int]) -> None:
        """Drop every row but these, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.row = {name: tensor[index] for name, tensor in self.row.items()}
        self.requests = [self.requests[r] for r in rows]
        self.limits = [self.limits[r] for r in rows]
        self.prompt_lengths = [self.prompt_lengths[r] for r in rows]
        self._born = [self._born[r] for r in rows]
        self._tables()

    def done(self) -> list[bool]:
        """Which rows are done. Waits for the device."""
        return self.row["done"].tolist()

    def collect(self, rows: Sequence[int]) -> list[Finished]:
        """The answers of rows that are done. Waits for the device."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        bad = self.row["nonfinite"][index].tolist()
        tokens, lengths, scores = (t.cpu().numpy() for t in self._outputs(index))
        answers = []
        for position, row in enumerate(rows):
            request = self.requests[row]
            if bad[position]:
                message = "the model's scores for this row are not finite"
                answers.append(Finished(request, error=RowErrorReason.NONFINITE, message=message))
                continue
            sequences = [
                self._generated(row, tokens[position, w], int(lengths[position, w]), float(scores[position, w]))
                for w in range(request.settings.num_return_sequences)
            ]
            answers.append(Finished(request, sequences))
        return answers

    @abstractmethod
    def _outputs(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Histories `[R', W, L]`, their lengths `[R', W]` and scores `[R', W]`, best first."""

    def _generated(self, row: int, tokens: Any, length: int, score: float) -> Generated:
        settings = self.requests[row].settings
        ids = tokens[self.prompt_lengths[row] : length].tolist()
        stopped = bool(ids) and ids[-1] in settings.eos_token_id
        forced = length >= self.limits[row] and settings.forced_eos_token_id is not None
        return Generated(
            ids, score if self._scores_known(settings) else None, "stop" if stopped and not forced else "length"
        )

    def _scores_known(self, settings: GenerationSettings) -> bool:
        return settings.output_scores


def _widened(x: Tensor, width: int, value: int) -> Tensor:
    return pad(x, (0, width - x.shape[-1]), value=value)
