"""Generation settings, with the names and meaning of `transformers.GenerationConfig`. No torch here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from s2s_ray.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How one row is decoded. Frozen and hashable; every row of a batch may have its own.

    Lengths are in tokens. `max_length` counts the decoder's start token and prompt, as in transformers and KerasHub;
    `max_new_tokens` does not and wins when both are set. `top_k=0`, `top_p=1.0`, `typical_p=1.0` and `min_p=0.0` switch
    those filters off. `penalty_alpha` above 0 is contrastive search among `top_k` candidates. `output_scores` asks for
    the sum of log-probabilities where the search does not need it anyway.
    Raises SettingsError when a value is out of range.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    penalty_alpha: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    decoder_start_token_id: int = 0
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = ()
    seed: int = 0
    output_scores: bool = False

    def __post_init__(self) -> None:
        for name in ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        ends = self.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
        object.__setattr__(self, "eos_token_id", tuple(ends))
        self._check_numbers()
        self._check_tokens()

    def _check_numbers(self) -> None:
        for name in ("num_beams", "num_return_sequences", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            optional = value is None and name.startswith("max")
            _require(optional or (_is_int(value) and value >= 1), name, "a whole number of at least 1", value)
        for name in ("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 0, name, "a whole number of at least 0", value)
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 < value < float("inf"), name, "a number above 0", value)
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 < value <= 1, name, "a number above 0 and at most 1", value)
        for name in ("min_p", "penalty_alpha"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value <= 1, name, "a number from 0 to 1", value)
        alone = self.num_beams == self.num_return_sequences == 1 and not self.do_sample and self.top_k > 1
        what = "0 (no contrastive search) unless top_k is above 1, with one beam, one sequence and no sampling"
        _require(alone or not self.penalty_alpha, "penalty_alpha", what, self.penalty_alpha)
        finite = _is_number(self.length_penalty) and abs(self.length_penalty) < float("inf")
        _require(finite, "length_penalty", "a finite number", self.length_penalty)
        known = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _require(known, "early_stopping", 'True, False or "never"', self.early_stopping)
        _require(_is_int(self.seed) and abs(self.seed) < 2**63, "seed", "a 64-bit whole number", self.seed)
        count, beams = self.num_return_sequences, self.num_beams
        enough = count <= beams or (self.do_sample and beams == 1)
        _require(enough, "num_return_sequences", f"at most num_beams ({beams}) unless one beam samples", count)

    def _check_tokens(self) -> None:
        for name in ("decoder_start_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            optional = value is None and name.startswith("forced")
            _require(optional or _is_token(value), name, "a token id, 0 or more", value)
        for name in ("eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            values = getattr(self, name)
            _require(all(map(_is_token, values)), name, "token ids, 0 or more", values)
        words = self.bad_words_ids
        valid = all(isinstance(word, tuple) and word and all(map(_is_token, word)) for word in words)
        _require(valid, "bad_words_ids", "sequences of token ids, none of them empty", words)

    def replace(self, **changes: Any) -> "GenerationSettings":
        """A copy with `changes` applied. Raises SettingsError for a name that is not a setting."""
        unknown = sorted(set(changes) - FIELD_NAMES)
        if unknown:
            raise SettingsError(f"unknown generation setting {unknown[0]!r}; known: {', '.join(sorted(FIELD_NAMES))}")
        return dataclasses.replace(self, **changes)

    def length_limit(self, prompt_length: int, family_limit: int | None = None) -> int:
        """The largest decoder length (start token and prompt included) this row may reach.

        `prompt_length` counts the start token and the prompt; `family_limit` is the longest the model has positions
        for. With neither `max_length` nor `max_new_tokens` set, the family's limit applies (never a silent 20).
        """
        limit = self.max_length if self.max_length is not None else (family_limit or 2**31)
        if self.max_new_tokens is not None:
            limit = prompt_length + self.max_new_tokens
        return min(limit, family_limit) if family_limit is not None else limit

    def to_config(self) -> dict[str, Any]:
        """The settings that differ from their defaults, as `generation_config.json` holds them."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("seed", "output_scores"):
                changed[field.name] = list(value) if isinstance(value, tuple) else value
        changed |= {name: getattr(self, name) for name in ("decoder_start_token_id", "pad_token_id")}
        if len(self.eos_token_id) == 1:
            changed["eos_token_id"] = self.eos_token_id[0]
        return changed

    @classmethod
    def from_configs(cls, *configs: Mapping[str, Any]) -> "GenerationSettings":
        """Merge dictionaries in the style of `generation_config.json`; later ones win, unknown keys and nulls are
        ignored.
        """
        merged: dict[str, Any] = {}
        for config in configs:
            merged.update({k: v for k, v in config.items() if k in FIELD_NAMES and v is not None})
        if merged.get("decoder_start_token_id") is None:
            merged["decoder_start_token_id"] = next(
                (c["bos_token_id"] for c in reversed(configs) if c.get("bos_token_id") is not None), 0
            )
        if merged.get("do_sample") or merged.get("num_beams", 1) != 1:
            merged.pop("penalty_alpha", None)  # as in transformers, which then samples or searches with beams
        if merged.get("do_sample") or merged.get("penalty_alpha"):
            merged.setdefault("top_k", 50)  # transformers' default where a checkpoint says no more
        return cls(**merged)


FIELD_NAMES = frozenset(f.name for f in dataclasses.fields(GenerationSettings))


def _require(holds: bool, name: str, what: str, value: object) -> None:
    if not holds:
        raise SettingsError(f"{name} must be {what}. Received: {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _frozen(name: str, value: Any) -> tuple[Any, ...]:
    _require(value is None or isinstance(value, (list, tuple)), name, "a sequence of token ids", value)
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value or ())
