"""Speculative decoding (Leviathan et al. 2022, arXiv:2211.17192) of greedy rows: several tokens a step, none changed.

A step feeds a row its last token and a few guesses of what follows; the model's choice after each of them is greedy
search's as long as the guesses before it were right. So the rules of a row (constraints, prompt, limits) hold at every
place, and its tokens are those that greedy search gives. It pays where a step waits for the weights, not for the
products: with few rows.

Dimensions: R rows, W tokens fed a row (the last one and the guesses), N = R x W, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2s_ray.errors import RowErrorReason, SettingsError
from s2s_ray.generation import selection
from s2s_ray.generation.cache import closing_order
from s2s_ray.generation.constraints import Constraints, History
from s2s_ray.generation.drafts import ChainCache, ChainCaches, Draft, ModelDraft, SourceDraft
from s2s_ray.generation.requests import Finished, Generated, Request
from s2s_ray.generation.scheduler import Budget, Scheduler
from s2s_ray.models.backbone import Backbone


@dataclass(frozen=True, slots=True)
class Speculation:
    """At most `num_tokens` guesses a step, by the model `draft`, or without one from the row's own source."""

    num_tokens: int = 5
    draft: Backbone | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_tokens, bool) or not isinstance(self.num_tokens, int) or self.num_tokens < 1:
            raise SettingsError(f"num_tokens must be a whole number of at least 1. Received: {self.num_tokens!r}")

    def begin(self, requests: Sequence[Request]) -> Draft:
        """The guesses for these rows."""
        if self.draft is None:
            return SourceDraft(requests, self.num_tokens)
        return ModelDraft(self.draft, requests, self.num_tokens)

    def check(self, backbone: Backbone) -> None:
        """Raises SettingsError for a draft model that cannot guess for this one."""
        if self.draft is None:
            return
        if self.draft.vocabulary_size != backbone.vocabulary_size:
            sizes = f"{self.draft.vocabulary_size} and {backbone.vocabulary_size}"
            raise SettingsError(f"the draft model must have the vocabulary of the model. Received: {sizes} tokens")
        theirs, ours = self.draft.max_source_length, backbone.max_source_length
        if theirs is not None and (ours is None or theirs < ours):
            raise SettingsError(
                f"the draft model must read sources as long as the model does. Received: {theirs} and {ours} tokens"
            )


@dataclass(slots=True)
class _Row:
    """A row being decoded: its text with start token and prompt, and the score so far."""

    request: Request
    limit: int
    text: list[int]
    score: float = 0.0
    answer: Finished | None = None

    def add(self, token: int, gained: float, finite: bool) -> None:
        """Take the model's choice of the next token, or the prompt's token while there is one."""
        prompt, settings = self.request.prompt_ids, self.request.settings
        reading = len(self.text) <= len(prompt)
        if not finite:
            message = "the model's scores for this row are not finite"
            self.answer = Finished(self.request, error=RowErrorReason.NONFINITE, message=message)
            return
        self.text.append(prompt[len(self.text) - 1] if reading else token)
        self.score += 0.0 if reading else gained
        full = len(self.text) >= self.limit
        if full or (not reading and token in settings.eos_token_id):
            ids = self.text[1 + len(prompt) :]
            forced = full and settings.forced_eos_token_id is not None
            reason = "stop" if ids and ids[-1] in settings.eos_token_id and not forced else "length"
            score = self.score if settings.output_scores else None
            self.answer = Finished(self.request, [Generated(ids, score, reason)])


class _Cohort:
    """Rows admitted together."""

    def __init__(self, backbone: Backbone, speculation: Speculation, rows: list[_Row]) -> None:
        requests = [row.request for row in rows]
        self.rows = rows
        self.cache = ChainCache(backbone, requests)
        self._fed: Tensor  # [R, W]
        self._draft = speculation.begin(requests)
        self._device = next(backbone.parameters()).device

    def guess(self) -> Tensor:
        """The tokens to feed, int64 `[N]`: each row's last one and its guesses."""
        texts = [row.text for row in self.rows]
        guesses = [
            guess[: max(0, row.limit - len(row.text) - 1)]  # what lies beyond the limit cannot count
            for row, guess in zip(self.rows, self._draft.propose(texts), strict=True)
        ]
        width = 1 + max(map(len, guesses))
        fed = [[text[-1], *guess] + [0] * (width - 1 - len(guess)) for text, guess in zip(texts, guesses, strict=True)]
        self.cache.begin(width)
        self._fed = torch.tensor(fed, device=self._device)
        return self._fed.flatten()

    def verify(self, logits: Tensor) -> list[Finished]:
        """Take the guesses that the model's logits `[N, V]` confirm, and answer the rows that are done."""
        texts, width = [row.text for row in self.rows], self._fed.shape[1]
        before = [len(text) for text in texts]
        chosen = [values.view(-1, width).tolist() for values in self._choices(logits, before)]
        for row, guess, choices in zip(self.rows, self._fed.tolist(), zip(*chosen, strict=True), strict=True):
            for place, choice in enumerate(zip(*choices, strict=True)):
                row.add(*choice)
                if row.answer is not None or place + 1 == width or guess[place + 1] != row.text[-1]:
                    break
        counts = [len(text) - length for text, length in zip(texts, before, strict=True)]
        self.cache.accept(counts)
        self._draft.accept(counts)
        return self._leave()

    def _choices(self, logits: Tensor, before: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """After each token fed: greedy search's next one int64 `[N]`, its log-probability by the model alone fp32
        `[N]` (0 where no row wants scores), and whether it is a number, bool `[N]`.
        """
        fed = self._fed
        width, requests = fed.shape[1], [row.request for row in self.rows]
        scored = any(request.settings.output_scores for request in requests)
        lengths = torch.tensor(before, device=fed.device)
        prompts, limits = [1 + len(r.prompt_ids) for r in requests], [row.limit for row in self.rows]
        constraints = Constraints(requests, prompts, limits, width, fed.device)
        raw = logits
        if constraints:
            history = torch.zeros(len(before), max(before) + width - 1, dtype=torch.int64)
            for tokens, row in zip(history, self.rows, strict=True):
                tokens[: len(row.text)] = torch.tensor(row.text)
            history = history.to(fed.device)
            steps = torch.arange(width, device=fed.device)
            history.scatter_(1, lengths[:, None] - 1 + steps, fed)
            logits = logits.to(torch.float32 if constraints.rescales else logits.dtype, copy=scored)
            each = (lengths[:, None] + steps).flatten()
            constraints.apply(logits, History(history.repeat_interleave(width, dim=0), each))
        best, tokens, _ = selection.best(logits, 1, normaliser=False)
        gained = torch.zeros_like(best)
        if scored:
            gained = raw.gather(1, tokens).float() - raw.float().logsumexp(dim=1, keepdim=True)
        return tokens, gained, best < float("inf")

    def _leave(self) -> list[Finished]:
        answers = [row.answer for row in self.rows if row.answer is not None]
        if answers and len(answers) < len(self.rows):
            order = closing_order([row.answer is None for row in self.rows])
            self.rows = [self.rows[row] for row in order]
            self.cache.keep(order)
            self._draft.keep(order)
        elif answers:
            self.rows = []
        return answers


class SpeculativeDecoder:
    """The engine's decoder for greedy rows that are decoded several tokens a step."""

    def __init__(self, backbone: Backbone, budget: Budget, speculation: Speculation) -> None:
        speculation.check(backbone)
        if speculation.draft is not None:
            speculation.draft.pack()
        self.backbone = backbone
        self.budget = budget
        self._speculation = speculation
        self._cohorts: list[_Cohort] = []

    @property
    def busy(self) -> bool:
        """Whether any row is being decoded."""
        return bool(self._cohorts)

    def kind(self, request: Request, limit: int) -> tuple[Any, ...]:
        """Greedy rows alone. Raises SettingsError for others."""
        settings = request.settings
        for name, value in (("num_beams", 1), ("num_return_sequences", 1), ("do_sample", False), ("penalty_alpha", 0)):
            if getattr(settings, name) != value:
                received = getattr(settings, name)
                raise SettingsError(f"{name} must be {value} for speculative decoding. Received: {received!r}")
        return "speculative", 1

    def next_rows(self, scheduler: Scheduler) -> tuple[Any, list[Request]] | None:
        """The rows to admit now and their kind."""
        rows = [row for cohort in self._cohorts for row in cohort.rows]
        return scheduler.next_cohort(len(rows), sum(len(row.request.token_ids) for row in rows))

    def admit(self, kind: tuple[Any, ...], requests: list[Request], limits: list[int]) -> None:
        """Encode the rows. Raises torch.OutOfMemoryError; nothing is held then."""
        rows = [
            _Row(request, limit, [request.settings.decoder_start_token_id])
            for request, limit in zip(requests, limits, strict=True)
        ]
        self._cohorts.append(_Cohort(self.backbone, self._speculation, rows))

    def step(self) -> list[Finished]:
        """One step of every cohort; the rows that are done now."""
        fed = [cohort.guess() for cohort in self._cohorts]
        logits = self.backbone.decode(torch.cat(fed), ChainCaches([cohort.cache for cohort in self._cohorts]))
        parts = zip(self._cohorts, logits.split([len(ids) for ids in fed]), strict=True)
        answers = [answer for cohort, scores in parts for answer in cohort.verify(scores)]
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        return answers

    @property
    def slots(self) -> int:
        """Rows that may be decoded at one time."""
        return self.budget.slots

    def live(self) -> int:
        """Rows being decoded."""
        return sum(len(cohort.rows) for cohort in self._cohorts)
