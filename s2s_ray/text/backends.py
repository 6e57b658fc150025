"""What a `Tokenizer` runs on: the interface, and the `tokenizers` library behind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from s2s_ray.errors import PresetError
from s2s_ray.storage import Location, strict_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

MAX_TOKENIZER_BYTES = 128 * 2**20  # the largest published tokenizer.json files are about 40 MB
_PROBE = "a B 1."
MAX_WRAP = 16  # tokens a post-processor may put around a text
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
BART_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


class Backend(Protocol):
    """Text to ids and back, with nothing but the ids of the text itself."""

    prefix_ids: list[int]  # around every text
    suffix_ids: list[int]
    special_ids: set[int]  # ids that carry no text

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id."""

    def token_to_id(self, token: str) -> int | None:
        """None for what is no token."""

    def id_to_token(self, id: int) -> str | None:
        """None for what is no id."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ragged ids without `prefix_ids` and `suffix_ids`."""

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts without special tokens and what is no id."""

    def files(self) -> dict[str, bytes]:
        """What a preset holds of it, by file name."""


class LibraryBackend:
    """A tokenizer of the `tokenizers` library: `tokenizer.json`, or a byte-level BPE."""

    def __init__(self, library: "Library") -> None:
        library.no_truncation()
        library.no_padding()
        self.library = library
        self.prefix_ids, self.suffix_ids = _wrap(library)
        added = library.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in added.items() if token.special}

    def vocabulary(self) -> dict[str, int]:
        return self.library.get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        return self.library.id_to_token(id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.library.decode_batch([list(row) for row in rows], skip_special_tokens=True)

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.library.to_str().encode()}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a preset's file; {} where there is no such file. Raises PresetError for anything else."""
    if not path.exists():
        return {}
    value = strict_json(read_capped(path), str(path), PresetError)
    if not isinstance(value, dict):
        raise PresetError(f"{path} must hold a JSON object. Received: {type(value).__name__}")
    return value


def raise_unless_tokenizers_failed(error: BaseException) -> None:
    """Re-raise what is not the library's: its errors are Exceptions, its panics derive from BaseException alone."""
    if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
        raise error


def read_capped(path: Path) -> bytes:
    data = Location.parse(path).read_bytes(MAX_TOKENIZER_BYTES + 1)
    if len(data) > MAX_TOKENIZER_BYTES:
        raise PresetError(f"{path} must be at most {MAX_TOKENIZER_BYTES} bytes")
    return data


def token_name(value: Any) -> str | None:
    """A token in a tokenizer_config.json is a string or an AddedToken's dictionary."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def read_tokenizer_json(path: Path) -> LibraryBackend:
    from tokenizers import Tokenizer as Library

    data = read_capped(path)
    try:
        library = Library.from_buffer(data)
    except BaseException as error:
        raise_unless_tokenizers_failed(error)
        raise PresetError(f"{path} is not a tokenizer file that can be read: {str(error)[:300]}") from error
    return LibraryBackend(library)


def read_byte_level_bpe(path: Path, names: Mapping[str, Any]) -> LibraryBackend:
    """GPT-2's byte-level BPE in BART's <s> ... </s>, as transformers builds it where there is no tokenizer.json."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    vocabulary = read_json_object(path / "vocab.json")
    try:
        lines = read_capped(path / "merges.txt").decode("utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        backend = Library(models.BPE(vocab=vocabulary, merges=pairs))  # type: ignore[arg-type]
    except BaseException as error:
        raise_unless_tokenizers_failed(error)
        raise PresetError(
            f"vocab.json and merges.txt in {path} must be a byte-level BPE: {str(error)[:300]}"
        ) from error
    prefix_space = bool(names.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    tokens = {role: token_name(names.get(role)) or BART_NAMES[role] for role in _SPECIAL_NAMES}
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
    return LibraryBackend(backend)


def _wrap(backend: "Library") -> tuple[list[int], list[int]]:
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
