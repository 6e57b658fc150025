"""The state of the rows being decoded, and how scores move it on: one class for sampling (greedy included), one for
beams.

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
from s2s_ray.generation.random import uniform
from s2s_ray.generation.requests import Finished, Generated, Request
from s2s_ray.generation.samplers import Nucleus, Sampler, Warpers
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.nn.ragged import all_to_device, to_device

_CAPACITY = 32  # tokens of history; doubles when full
_HELD_STOPS = 8  # stop tokens a row may have where the state stays in place
_IMPOSSIBLE = -1.0e9  # transformers' score of a beam that may not win


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


def _widened(x: Tensor, width: int, value: int) -> Tensor:
    return pad(x, (0, width - x.shape[-1]), value=value)
