"""What goes into the engine and what comes out. No torch here: the pipelines use these nouns too."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from s2s_ray.errors import RowErrorReason
from s2s_ray.generation.settings import GenerationSettings


@dataclass(frozen=True, slots=True)
class Request:
    """One row to generate from.

    `token_ids` is the source with its special tokens. `prompt_ids` is forced decoder text after the start token.
    `row_id` (64-bit) and `settings.seed` alone decide the row's random draws. `key` is handed back untouched.
    """

    row_id: int
    token_ids: Sequence[int]
    settings: GenerationSettings
    prompt_ids: Sequence[int] = ()
    key: object = None


@dataclass(frozen=True, slots=True)
class Generated:
    """One generated sequence: new tokens only (no start token, no prompt), the stop token included if one was produced.

    `score` is the sum of log-probabilities of the new tokens under the model's own distribution, or None unless
    `output_scores` is set; for beam search it is always there, taken after the constraints and divided by
    length ** length_penalty, as in transformers. `finish_reason` is "stop" or "length".
    """

    token_ids: list[int]
    score: float | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer to one request: sequences best first, or an error reason with a message and no sequences."""

    request: Request
    sequences: list[Generated] = field(default_factory=list)
    error: RowErrorReason | None = None
    message: str = ""
