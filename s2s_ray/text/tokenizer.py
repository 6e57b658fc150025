"""Text to token ids and back, whatever a preset's tokenizer is made of.

Files are treated as untrusted: sizes are capped, the padding and truncation stored in a `tokenizer.json` are switched
off, and a panic inside the library (a BaseException in Python) becomes a typed error. What wraps a text (BART: <s>
text </s>, T5: text </s>) is read off the file's own post-processor; the ids' roles come from `config.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from s2s_ray.errors import InputError, PresetError, PresetIntegrityError, RowErrorReason, S2SRayError
from s2s_ray.storage import canonical_json
from s2s_ray.text.backends import (
    BART_NAMES,
    MAX_TOKENIZER_BYTES,
    Backend,
    raise_unless_tokenizers_failed,
    read_byte_level_bpe,
    read_json_object,
    read_tokenizer_json,
    token_name,
)
from s2s_ray.text.families import SENTENCEPIECE_NAMES, read_family

__all__ = ["MAX_TOKENIZER_BYTES", "TokenizationError", "Tokenizer", "read_json_object"]


class TokenizationError(S2SRayError, ValueError):
    """A text cannot be tokenised. `row` is its index in the list given (-1 when unknown), `reason` why."""

    def __init__(self, row: int, reason: RowErrorReason, message: str) -> None:
        super().__init__(f"text {row} cannot be tokenised ({reason}): {message}")
        self.row = row
        self.reason = reason


class Tokenizer:
    """KerasHub's tokenizer interface: calling it gives ids without special tokens, `detokenize` gives text.

    `prefix_ids` and `suffix_ids` are what the model expects around every text. `start_token_id` is None for families
    without one (T5). Tokens for which the model has no embedding (`id_limit`: bart-large-cnn's <mask>) become the
    unknown token, as their id would index past the end of the embedding. `target` is the tokenizer of the other side:
    this one, but for Marian, which has a model of its own there.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        end_token_id: int,
        pad_token_id: int,
        start_token_id: int | None = None,
        id_limit: int | None = None,
        config: Mapping[str, Any] | None = None,
        target: "Tokenizer | None" = None,
    ) -> None:
        self._backend = backend
        self.target: Tokenizer = self if target is None else target
        self._config = dict(config or {})
        self.start_token_id = start_token_id
        self.end_token_id = end_token_id
        self.pad_token_id = pad_token_id
        self._id_limit = _effective_limit(backend, id_limit)
        unknown = token_name(self._config.get("unk_token"))
        self._unknown_id = backend.token_to_id(unknown) if unknown else None
        self.prefix_ids, self.suffix_ids = backend.prefix_ids, backend.suffix_ids
        for role, token_id in (("start", start_token_id), ("end", end_token_id), ("pad", pad_token_id)):
            if token_id is not None and (backend.id_to_token(token_id) is None or token_id >= (id_limit or 2**31)):
                raise PresetIntegrityError(
                    f"the {role} token id must be a token of tokenizer and model. Received: {token_id}, with "
                    f"{len(backend.vocabulary())} tokens and {id_limit} embedding rows; these do not belong together"
                )

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`, else the family's files (`s2s_ray.text.families`), else `vocab.json` and `merges.txt`.

        Roles of ids come from `config.json`, else from the token names in `tokenizer_config.json` or
        `special_tokens_map.json`. Raises PresetError for files that cannot be used and PresetIntegrityError when
        tokenizer and config contradict each other.
        """
        config = read_json_object(path / "config.json")
        names: dict[str, Any] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            names.update({k: v for k, v in read_json_object(path / file).items() if v is not None})
        if (path / "tokenizer.json").exists():
            return cls._of(read_tokenizer_json(path / "tokenizer.json"), config, names)
        family = read_family(path, config, names)
        if family is not None:
            names = {**SENTENCEPIECE_NAMES, **names}
            target = None
            if len(family) > 1:
                limit = config.get("decoder_vocab_size", config.get("vocab_size"))
                target = cls._of(family[1], {"vocab_size": limit}, names)
            return cls._of(family[0], config, names, target)
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            names = {**BART_NAMES, **names}
            return cls._of(read_byte_level_bpe(path, names), config, names)
        raise PresetError(
            "a preset must hold tokenizer.json, a SentencePiece model under its family's name (docs/tokenizers.md), or "
            f"vocab.json and merges.txt. Received: {path}. Convert others with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )

    @classmethod
    def _of(
        cls, backend: Backend, config: Mapping[str, Any], names: Mapping[str, Any], target: "Tokenizer | None" = None
    ) -> "Tokenizer":
        vocabulary_size = config.get("vocab_size")
        return cls(
            backend,
            start_token_id=_special_id(backend, config, names, "bos"),
            end_token_id=_required_id(backend, config, names, "eos"),
            pad_token_id=_required_id(backend, config, names, "pad"),
            id_limit=vocabulary_size if isinstance(vocabulary_size, int) else None,
            config=names,
            target=target,
        )

    def save(self, directory: Path) -> None:
        """Write the tokenizer's own files and a `tokenizer_config.json`, which transformers reads too."""
        names = dict(self._config)
        for role, token_id in (
            ("bos_token", self.start_token_id),
            ("eos_token", self.end_token_id),
            ("pad_token", self.pad_token_id),
        ):
            if token_id is not None:
                names.setdefault(role, self.id_to_token(token_id))
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self._backend.files().items():
            (directory / name).write_bytes(data)
        (directory / "tokenizer_config.json").write_bytes(canonical_json(names))

    @property
    def special_token_ids(self) -> list[int]:
        """Ids that carry no text, sorted; `detokenize` leaves them out."""
        own = (self.start_token_id, self.end_token_id, self.pad_token_id)
        return sorted(self._backend.special_ids | {token_id for token_id in own if token_id is not None})

    def vocabulary_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self._backend.vocabulary())

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""
        return self._backend.vocabulary()

    @property
    def config(self) -> dict[str, Any]:
        """What `tokenizer_config.json` and `special_tokens_map.json` held."""
        return dict(self._config)

    def token_to_id(self, token: str) -> int:
        """Raises InputError for a token that is not in the vocabulary."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"a token of the vocabulary is needed. Received: {token!r}")
        return token_id

    def id_to_token(self, id: int) -> str:
        """Raises InputError for an id that is not in the vocabulary."""
        token = self._backend.id_to_token(id) if 0 <= id < 2**32 else None
        if token is None:
            raise InputError(f"an id of the vocabulary is needed. Received: {id!r}")
        return token

    @overload
    def __call__(self, inputs: str) -> list[int]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, inputs: Sequence[str]) -> list[list[int]]: ...
    def __call__(self, inputs: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Ids without special tokens, ragged."""
        if isinstance(inputs, str):
            return self.encode_batch([inputs], add_special_tokens=False)[0]
        return self.encode_batch(inputs, add_special_tokens=False)

    def encode_batch(self, texts: Iterable[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ragged ids, in parallel over the texts. Raises TokenizationError (row -1) if any text cannot be encoded."""
        rows = list(texts)
        try:
            ids = self._backend.encode(rows)
        except BaseException as error:
            raise_unless_tokenizers_failed(error)
            raise TokenizationError(-1, RowErrorReason.TOKENIZER_FAILED, str(error)[:512]) from error
        if self._id_limit is not None:
            ids = [self._within_limit(row, self._id_limit) for row in ids]
        if add_special_tokens:
            ids = [[*self.prefix_ids, *row, *self.suffix_ids] for row in ids]
        return ids

    @overload
    def detokenize(self, inputs: Sequence[int]) -> str: ...
    @overload
    def detokenize(self, inputs: Sequence[Sequence[int]]) -> list[str]: ...
    def detokenize(self, inputs: Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """Text of one sequence or of several; special tokens and ids outside the vocabulary are left out."""
        rows: list[Any] = inputs.tolist() if isinstance(inputs, np.ndarray) else list(inputs)
        single = not rows or isinstance(rows[0], (int, np.integer))
        texts = self.decode_batch([rows] if single else rows)
        return texts[0] if single else texts

    def decode_batch(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """One text per row of ids. Raises TokenizationError if the tokenizer file's decoder fails."""
        ids = [[int(i) for i in row if 0 <= i < 2**32] for row in rows]
        try:
            return self._backend.decode(ids)
        except BaseException as error:
            raise_unless_tokenizers_failed(error)
            raise TokenizationError(-1, RowErrorReason.TOKENIZER_FAILED, str(error)[:512]) from error

    def _within_limit(self, row: list[int], limit: int) -> list[int]:
        if not row or max(row) < limit:
            return row
        unknown = [] if self._unknown_id is None else [self._unknown_id]
        return [kept for i in row for kept in ([i] if i < limit else unknown)]


def _effective_limit(backend: Backend, id_limit: int | None) -> int | None:
    """None when every token has an embedding. Raises PresetIntegrityError when an ordinary token has none."""
    if id_limit is None:
        return None
    beyond = {token_id: token for token, token_id in backend.vocabulary().items() if token_id >= id_limit}
    ordinary = sorted(beyond.keys() - backend.special_ids)
    if ordinary:
        raise PresetIntegrityError(
            f"every token id must be below the model's vocabulary size {id_limit}. Received: {len(ordinary)} not, "
            f"the first is {beyond[ordinary[0]]!r} with id {ordinary[0]}; this is another model's tokenizer"
        )
    return id_limit if beyond else None


def _special_id(backend: Backend, config: Mapping[str, Any], names: Mapping[str, Any], role: str) -> int | None:
    value = config.get(f"{role}_token_id")
    if isinstance(value, list) and value:
        value = value[0]
    name = token_name(names.get(f"{role}_token"))
    named = backend.token_to_id(name) if name is not None else None
    if value is None:
        return named
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise PresetError(f"{role}_token_id in config.json must be a token id. Received: {value!r}")
    if role != "bos" and named is not None and named != value:
        raise PresetIntegrityError(
            f"config.json and tokenizer must agree on {role}_token_id. Received: {value} in config.json, {named} for "
            f"{name!r} in the tokenizer; this is another model's tokenizer"
        )
    return value


def _required_id(backend: Backend, config: Mapping[str, Any], names: Mapping[str, Any], role: str) -> int:
    token_id = _special_id(backend, config, names, role)
    if token_id is None:
        raise PresetError(
            f"config.json must name {role}_token_id, or tokenizer_config.json a {role}_token of the vocabulary"
        )
    return token_id
