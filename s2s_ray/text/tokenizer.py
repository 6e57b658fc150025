"""Text to token ids and back, on top of the `tokenizers` library.

The file is treated as untrusted: its size is capped, the padding and truncation stored in it are switched off, and a
panic inside the library (a BaseException in Python) becomes a typed error. What wraps a text (BART: <s> text </s>,
T5: text </s>) is read off the file's own post-processor; the ids' roles come from `config.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from s2s_ray.errors import InputError, PresetError, PresetIntegrityError, RowErrorReason, S2SRayError
from s2s_ray.storage import Location, canonical_json, strict_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKENIZER_BYTES = 128 * 2**20  # the largest published tokenizer.json files are about 40 MB
_PROBE = "a B 1."
MAX_WRAP = 16  # tokens a post-processor may put around a text
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_BART_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


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
    unknown token, as their id would index past the end of the embedding.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        end_token_id: int,
        pad_token_id: int,
        start_token_id: int | None = None,
        id_limit: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._config = dict(config or {})
        self.start_token_id = start_token_id
        self.end_token_id = end_token_id
        self.pad_token_id = pad_token_id
        self._id_limit = _effective_limit(backend, id_limit)
        unknown = _token_name(self._config.get("unk_token"))
        self._unknown_id = backend.token_to_id(unknown) if unknown else None
        self.prefix_ids, self.suffix_ids = _wrap(backend)
        for role, token_id in (("start", start_token_id), ("end", end_token_id), ("pad", pad_token_id)):
            if token_id is not None and (backend.id_to_token(token_id) is None or token_id >= (id_limit or 2**31)):
                raise PresetIntegrityError(
                    f"the {role} token id must be a token of tokenizer and model. Received: {token_id}, with "
                    f"{backend.get_vocab_size()} tokens and {id_limit} embedding rows; these do not belong together"
                )

    @classmethod
    def from_directory(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`, else `vocab.json` and `merges.txt` (byte-level BPE as BART's).

        Roles of ids come from `config.json`, else from the token names in `tokenizer_config.json` or
        `special_tokens_map.json`. Raises PresetError for files that cannot be used and PresetIntegrityError when
        tokenizer and config contradict each other.
        """
        config = read_json_object(path / "config.json")
        names: dict[str, Any] = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            names.update({k: v for k, v in read_json_object(path / file).items() if v is not None})
        if (path / "tokenizer.json").exists():
            backend = _read_backend(path / "tokenizer.json")
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            names = {**_BART_NAMES, **names}
            backend = _byte_level_bpe(path, names)
        else:
            raise PresetError(
                f"a preset must hold tokenizer.json, or vocab.json and merges.txt. Received: {path}. Convert others "
                "with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        vocabulary_size = config.get("vocab_size")
        return cls(
            backend,
            start_token_id=_special_id(backend, config, names, "bos"),
            end_token_id=_required_id(backend, config, names, "eos"),
            pad_token_id=_required_id(backend, config, names, "pad"),
            id_limit=vocabulary_size if isinstance(vocabulary_size, int) else None,
            config=names,
        )

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` that transformers reads too."""
        names = dict(self._config)
        for role, token_id in (
            ("bos_token", self.start_token_id),
            ("eos_token", self.end_token_id),
            ("pad_token", self.pad_token_id),
        ):
            if token_id is not None:
                names.setdefault(role, self.id_to_token(token_id))
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._backend.to_str(), encoding="utf-8")
        (directory / "tokenizer_config.json").write_bytes(canonical_json(names))

    @property
    def special_token_ids(self) -> list[int]:
        """Ids that carry no text, sorted; `detokenize` leaves them out."""
        added = self._backend.get_added_tokens_decoder()
        ids = {token_id for token_id, token in added.items() if token.special}
        own = (self.start_token_id, self.end_token_id, self.pad_token_id)
        return sorted(ids | {token_id for token_id in own if token_id is not None})

    def vocabulary_size(self) -> int:
        """The number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Every token, added ones included, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

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
            encodings = self._backend.encode_batch_fast(rows, add_special_tokens=False)
        except BaseException as error:
            raise_unless_tokenizers_failed(error)
            raise TokenizationError(-1, RowErrorReason.TOKENIZER_FAILED, str(error)[:512]) from error
        ids = [encoding.ids for encoding in encodings]
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
            return self._backend.decode_batch(ids, skip_special_tokens=True)
        except BaseException as error:
            raise_unless_tokenizers_failed(error)
            raise TokenizationError(-1, RowErrorReason.TOKENIZER_FAILED, str(error)[:512]) from error

    def _within_limit(self, row: list[int], limit: int) -> list[int]:
        if not row or max(row) < limit:
            return row
        unknown = [] if self._unknown_id is None else [self._unknown_id]
        return [kept for i in row for kept in ([i] if i < limit else unknown)]


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a preset's file; {} where there is no such file. Raises PresetError for anything else."""
    if not path.exists():
        return {}
    value = strict_json(_read_capped(path), str(path), PresetError)
    if not isinstance(value, dict):
        raise PresetError(f"{path} must hold a JSON object. Received: {type(value).__name__}")
    return value


def raise_unless_tokenizers_failed(error: BaseException) -> None:
    """Re-raise what is not the library's: its errors are Exceptions, its panics derive from BaseException alone."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error


def _read_capped(path: Path) -> bytes:
    data = Location.parse(path).read_bytes(MAX_TOKENIZER_BYTES + 1)
    if len(data) > MAX_TOKENIZER_BYTES:
        raise PresetError(f"{path} must be at most {MAX_TOKENIZER_BYTES} bytes")
    return data


def _read_backend(path: Path) -> "Backend":
    from tokenizers import Tokenizer as Backend

    data = _read_capped(path)
    try:
        return Backend.from_buffer(data)
    except BaseException as error:
        raise_unless_tokenizers_failed(error)
        raise PresetError(f"{path} is not a tokenizer file that can be read: {str(error)[:300]}") from error


def _byte_level_bpe(path: Path, names: Mapping[str, Any]) -> "Backend":
    """GPT-2's byte-level BPE in BART's <s> ... </s>, as transformers builds it where there is no tokenizer.json."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocabulary = read_json_object(path / "vocab.json")
    try:
        lines = _read_capped(path / "merges.txt").decode("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        backend = Backend(models.BPE(vocab=vocabulary, merges=pairs))  # type: ignore[arg-type]
    except BaseException as error:
        raise_unless_tokenizers_failed(error)
        raise PresetError(
            f"vocab.json and merges.txt in {path} must be a byte-level BPE: {str(error)[:300]}"
        ) from error
    prefix_space = bool(names.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    tokens = {role: _token_name(names.get(role)) or _BART_NAMES[role] for role in _SPECIAL_NAMES}
    missing = sorted({token for token in (tokens["cls_token"], tokens["sep_token"]) if token not in vocabulary})
    if missing:
        raise PresetError(f"{path / 'vocab.json'} must hold the special tokens. Missing: {', '.join(missing)}")
    # Only what the vocabulary holds: adding others would give them ids past the model's embedding.
    known = [token for token in dict.fromkeys(tokens.values()) if token in vocabulary]
    mask = tokens["mask_token"]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False, lstrip=t == mask) for t in known])
    separator, first = tokens["sep_token"], tokens["cls_token"]
    backend.post_processor = processors.RobertaProcessing(
        (separator, vocabulary[separator]), (first, vocabulary[first]), add_prefix_space=prefix_space
    )
    return backend


def _wrap(backend: "Backend") -> tuple[list[int], list[int]]:
    """What the post-processor puts before and after a text."""
    try:
        plain = backend.encode(_PROBE, add_special_tokens=False).ids
        wrapped = backend.encode(_PROBE, add_special_tokens=True)
    except BaseException as error:
        raise_unless_tokenizers_failed(error)
        raise PresetError(f"the tokenizer file cannot encode a text: {str(error)[:300]}") from error
    if not plain:
        raise PresetError(f"the tokenizer must give tokens for a text. Received: none for {_PROBE!r}")
    before = next((i for i, special in enumerate(wrapped.special_tokens_mask) if not special), len(wrapped.ids))
    prefix, suffix = wrapped.ids[:before], wrapped.ids[before + len(plain) :]
    if len(prefix) + len(suffix) > MAX_WRAP or [*prefix, *plain, *suffix] != wrapped.ids:
        raise PresetError(
            f"the tokenizer's post-processor must put at most {MAX_WRAP} special tokens before and after a text. "
            f"Received: {wrapped.ids[: MAX_WRAP + 1]} for {plain[: MAX_WRAP + 1]}"
        )
    return prefix, suffix


def _effective_limit(backend: "Backend", id_limit: int | None) -> int | None:
    """None when every token has an embedding. Raises PresetIntegrityError when an ordinary token has none."""
    if id_limit is None:
        return None
    beyond = {token_id: token for token, token_id in backend.get_vocab(True).items() if token_id >= id_limit}
    added = backend.get_added_tokens_decoder()
    ordinary = sorted(i for i in beyond if i not in added or not added[i].special)
    if ordinary:
        raise PresetIntegrityError(
            f"every token id must be below the model's vocabulary size {id_limit}. Received: {len(ordinary)} not, "
            f"the first is {beyond[ordinary[0]]!r} with id {ordinary[0]}; this is another model's tokenizer"
        )
    return id_limit if beyond else None


def _token_name(value: Any) -> str | None:
    """A token in a tokenizer_config.json is a string or an AddedToken's dictionary."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_id(backend: "Backend", config: Mapping[str, Any], names: Mapping[str, Any], role: str) -> int | None:
    value = config.get(f"{role}_token_id")
    if isinstance(value, list) and value:
        value = value[0]
    name = _token_name(names.get(f"{role}_token"))
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


def _required_id(backend: "Backend", config: Mapping[str, Any], names: Mapping[str, Any], role: str) -> int:
    token_id = _special_id(backend, config, names, role)
    if token_id is None:
        raise PresetError(
            f"config.json must name {role}_token_id, or tokenizer_config.json a {role}_token of the vocabulary"
        )
    return token_id
