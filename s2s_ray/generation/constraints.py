"""What may not, or must, come next: the score processors of transformers, vectorised over rows with settings of their
own.

The order is transformers' (`generation/utils.py`, `_get_logits_processor`): repetition penalty, n-gram ban, n-gram ban
against the source, bad words, min length, forced first token, forced last token, suppressed tokens. Tables are made
when rows join or leave; a step only runs the processors that some row asked for.

Dimensions: N sequences (rows x width), L history length, V vocabulary, S source length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2s_ray.generation import selection
from s2s_ray.generation.requests import Request
from s2s_ray.generation.settings import GenerationSettings
from s2s_ray.nn.ragged import to_device

_BANNED = float("-inf")
Processor = Callable[[Tensor, "History"], None]


class History:
    """What each sequence consists of so far, start token and prompt included."""

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        """tokens int64 `[N, L]`, lengths int64 `[N]`; entries past a sequence's length mean nothing."""
        self.tokens = tokens
        self.lengths = lengths
        self.inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]

    def last(self, count: int) -> Tensor:
        """The last `count` tokens of each sequence, int64 `[N, count]`; -1 where a sequence is shorter."""
        index = self.lengths[:, None] - count + torch.arange(count, device=self.tokens.device)
        return self.tokens.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)


class Constraints:
    """The processors that a set of rows asked for, each with its tables on the device."""

    def __init__(
        self,
        requests: Sequence[Request],
        prompt_lengths: Sequence[int],
        limits: Sequence[int],
        width: int,
        device: torch.device,
    ) -> None:
        """One entry per row; a row stands for `width` neighbouring sequences. Lengths count start and prompt."""
        self._device = device
        self._width = width
        self._requests = requests
        self._settings, rows = _distinct(requests)  # rows mostly share theirs, so tables are made of few
        self._of_row = self._per_row(rows)
        self._processors: list[Processor] = []
        self._add_repetition_penalty()
        self._add_ngram_ban()
        self._add_source_ngram_ban()
        self._add_bad_words()
        self._add_min_length(prompt_lengths)
        self._add_forced("forced_bos_token_id", None)
        self._add_forced("forced_eos_token_id", limits)
        self._add_suppressed(prompt_lengths)

    def __bool__(self) -> bool:
        return bool(self._processors)

    @property
    def rescales(self) -> bool:
        """Whether scores are computed with, and so must be fp32; else they are only replaced, by 0 and infinity."""
        return any(s.repetition_penalty != 1.0 for s in self._settings)

    def apply(self, scores: Tensor, history: History) -> None:
        """Change scores `[N, V]` in place."""
        for processor in self._processors:
            processor(scores, history)

    def _per_row(self, values: Sequence[int]) -> Tensor:
        """A number of each row to one of each sequence, int64 `[N]`."""
        return to_device(torch.tensor(values, dtype=torch.int64), self._device).repeat_interleave(self._width)

    def _per_sequence(self, values: Sequence[float | int], dtype: torch.dtype) -> Tensor:
        """A value of each of `self._settings` to one of each sequence, `[N]`."""
        return to_device(torch.tensor(values, dtype=dtype), self._device)[self._of_row]

    def _add_repetition_penalty(self) -> None:
        if not self.rescales:
            return
        penalty = self._per_sequence([s.repetition_penalty for s in self._settings], torch.float32)[:, None]

        def process(scores: Tensor, history: History) -> None:
            seen = torch.where(history.inside, history.tokens, history.tokens[:, :1])
            values = scores.gather(1, seen)
            scores.scatter_(1, seen, torch.where(values < 0, values * penalty, values / penalty))

        self._processors.append(process)

    def _add_ngram_ban(self) -> None:
        sizes = [s.no_repeat_ngram_size for s in self._settings]
        for size in sorted({n for n in sizes if n > 0}):
            active = self._per_sequence([n == size for n in sizes], torch.bool)

            def process(scores: Tensor, history: History, size: int = size, active: Tensor = active) -> None:
                if history.tokens.shape[1] < size:
                    return
                ends_inside = history.inside[:, size - 1 :] & active[:, None]
                _ban_continuations(scores, history.last(size - 1), history.tokens, ends_inside, size)

            self._processors.append(process)

    def _add_source_ngram_ban(self) -> None:
        sizes = [s.encoder_no_repeat_ngram_size for s in self._settings]
        if not any(sizes):
            return
        source, inside = self._sources()
        for size in sorted({n for n in sizes if 0 < n <= source.shape[1]}):
            active = self._per_sequence([n == size for n in sizes], torch.bool)
            ends_inside = inside[:, size - 1 :] & active[:, None]

            def process(scores: Tensor, history: History, size: int = size, ends_inside: Tensor = ends_inside) -> None:
                _ban_continuations(scores, history.last(size - 1), source, ends_inside, size)

            self._processors.append(process)

    def _sources(self) -> tuple[Tensor, Tensor]:
        rows = [torch.as_tensor(request.token_ids, dtype=torch.int64) for request in self._requests]
        source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        inside = torch.arange(source.shape[1]) < lengths[:, None]
        repeated = (t.repeat_interleave(self._width, dim=0).to(self._device) for t in (source, inside))
        return next(repeated), next(repeated)

    def _add_bad_words(self) -> None:
        for words in sorted({s.bad_words_ids for s in self._settings if s.bad_words_ids}):
            rows = [s.bad_words_ids == words for s in self._settings]
            eos = {s.eos_token_id for s, active in zip(self._settings, rows, strict=True) if active}
            active = self._per_sequence(rows, torch.bool)
            # transformers drops a bad word that is nothing but a stop token.
            kept = [word for word in words if word and not any(len(word) == 1 and word[0] in ids for ids in eos)]
            single = torch.tensor([word[0] for word in kept if len(word) == 1], dtype=torch.int64, device=self._device)
            longer = [torch.tensor(word, dtype=torch.int64, device=self._device) for word in kept if len(word) > 1]

            def process(
                scores: Tensor,
                history: History,
                active: Tensor = active,
                single: Tensor = single,
                longer: list[Tensor] = longer,
            ) -> None:
                if single.numel():
                    _ban(scores, active, single)
                for word in longer:
                    matches = (history.last(len(word) - 1) == word[:-1]).all(dim=1) & active
                    _ban(scores, matches, word[-1:])

            self._processors.append(process)

    def _add_min_length(self, prompt_lengths: Sequence[int]) -> None:
        # A length below which no stop token may come, counted like the history.
        bounded = [s for s in self._settings if s.eos_token_id and (s.min_length or s.min_new_tokens)]
        for eos in sorted({s.eos_token_id for s in bounded}):
            least = [s.min_length * (s.eos_token_id == eos) for s in self._settings]
            least_new = [(s.min_new_tokens or 0) * (s.eos_token_id == eos) for s in self._settings]
            new = self._per_sequence(least_new, torch.int64)
            after_prompt = torch.where(new > 0, self._per_row(prompt_lengths) + new, 0)
            minimum = torch.maximum(self._per_sequence(least, torch.int64), after_prompt)
            ids = torch.tensor(eos, dtype=torch.int64, device=self._device)

            def process(scores: Tensor, history: History, minimum: Tensor = minimum, ids: Tensor = ids) -> None:
                _ban(scores, history.lengths < minimum, ids)

            self._processors.append(process)

    def _add_forced(self, name: str, limits: Sequence[int] | None) -> None:
        """Force a token to come last before each row's limit; without limits, first of all."""
        tokens = [getattr(s, name) for s in self._settings]
        if all(token is None for token in tokens):
            return
        active = self._per_sequence([token is not None for token in tokens], torch.bool)
        forced = self._per_sequence([token or 0 for token in tokens], torch.int64)
        at = torch.ones_like(forced) if limits is None else self._per_row(limits) - 1

        def process(scores: Tensor, history: History) -> None:
            selection.force(scores, active & (history.lengths == at), forced)

        self._processors.append(process)

    def _add_suppressed(self, prompt_lengths: Sequence[int]) -> None:
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            for ids in sorted({getattr(s, name) for s in self._settings if getattr(s, name)}):
                active = self._per_sequence([getattr(s, name) == ids for s in self._settings], torch.bool)
                table = torch.tensor(ids, dtype=torch.int64, device=self._device)
                begin = self._begins(prompt_lengths) if name == "begin_suppress_tokens" else None

                def process(
                    scores: Tensor,
                    history: History,
                    active: Tensor = active,
                    table: Tensor = table,
                    begin: Tensor | None = begin,
                ) -> None:
                    _ban(scores, active if begin is None else active & (history.lengths == begin), table)

                self._processors.append(process)

    def _begins(self, prompt_lengths: Sequence[int]) -> Tensor:
        """The length at which a sequence's first free token comes: transformers counts after a forced first one."""
        forced = self._per_sequence([s.forced_bos_token_id is not None for s in self._settings], torch.bool)
        prompts = self._per_row(prompt_lengths)
        return prompts + ((prompts == 1) & forced)


def _distinct(requests: Sequence[Request]) -> tuple[list[GenerationSettings], list[int]]:
    """The settings that occur, and for each request which of them it has."""
    numbers: dict[GenerationSettings, int] = {}
    known: dict[int, int] = {}  # by identity, which spares most of the hashing
    rows = []
    for request in requests:
        number = known.get(id(request.settings))
        if number is None:
            number = known[id(request.settings)] = numbers.setdefault(request.settings, len(numbers))
        rows.append(number)
    return list(numbers), rows


def _ban(scores: Tensor, rows: Tensor, ids: Tensor) -> None:
    """Ban `ids` int64 `[K]` in every row where `rows` bool `[N]` is set."""
    current = scores[:, ids]
    scores[:, ids] = current.masked_fill(rows[:, None], _BANNED)


def _ban_continuations(scores: Tensor, prefix: Tensor, text: Tensor, ends_inside: Tensor, size: int) -> None:
    """Ban every token that follows an occurrence of `prefix` `[N, size - 1]` in `text` `[N, L]`.

    ends_inside bool `[N, L - size + 1]` marks the windows that may count.
    """
    windows = text.unfold(1, size, 1)  # [N, L - size + 1, size]
    repeats = ends_inside & (windows[..., :-1] == prefix[:, None]).all(dim=-1)
    penalty = torch.where(repeats, _BANNED, -_BANNED).to(scores.dtype)
    scores.scatter_reduce_(1, windows[..., -1], penalty, "amin")
