"""Tokenizers of families that come without a `tokenizer.json`: SentencePiece models with each family's own ids, bytes.

    files                                       families                         id of SentencePiece's piece i
    spiece.model or sentencepiece.model         T5, mT5, umT5, MADLAD; Pegasus   i; i + 103
    sentencepiece.bpe.model                     mBART, mBART-50, NLLB            i + 1, behind <s> <pad> </s> <unk>
    sentencepiece.bpe.model, vocab.json         M2M100                           vocab.json[piece]
    source.spm, target.spm, vocab.json          Marian (and target_vocab.json)   vocab.json[piece]
    none ("tokenizer_class": "ByT5Tokenizer")   ByT5                             byte + 3

Sources: `transformers/models/<family>/tokenization_<family>.py` of 4.57 and 5.23.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s_ray.errors import PresetError
from s2s_ray.text.backends import Backend, read_capped, read_json_object, token_name
from s2s_ray.text.fairseq import (
    M2M100_LANGUAGES,
    MBART_25_LANGUAGES,
    MBART_50_LANGUAGES,
    NLLB_LANGUAGES,
    WMT21_LANGUAGES,
)
from s2s_ray.text.spm import CONTROL, SentencePieceModel

SENTENCEPIECE_NAMES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_SPIECE = ("spiece.model", "sentencepiece.model")
_FAIRSEQ = "sentencepiece.bpe.model"
_MAX_EXTRA_IDS = 10_000


class SentencePieceBackend:
    """A SentencePiece model whose pieces have ids of the family's own.

    special: the tokens that are recognised in a text and left out of decoded text. With `takes_language_code`, a text
    may begin with a `>>code<<`, which is a token of its own (Marian). `strips` decoded text, as transformers does for
    its tokenizers in Python.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        vocabulary: Mapping[str, int],
        special: Iterable[str],
        wrap: tuple[Sequence[str], Sequence[str]],
        files: Mapping[str, bytes],
        *,
        takes_language_code: bool = False,
        strips: bool = False,
    ) -> None:
        special = [token for token in special if token in vocabulary]
        missing = [token for part in wrap for token in part if token not in vocabulary]
        if "<unk>" not in vocabulary or missing:
            raise PresetError(f"the vocabulary must hold <unk> and the special tokens. Missing: {', '.join(missing)}")
        self.prefix_ids, self.suffix_ids = ([vocabulary[token] for token in part] for part in wrap)
        self.special_ids = {vocabulary[token] for token in special}
        self._model = model
        self._vocabulary = dict(vocabulary)
        self._tokens = {i: token for token, i in self._vocabulary.items()}
        self._unknown = self._vocabulary["<unk>"]
        self._ids = [self._vocabulary.get(piece, self._unknown) for piece in model.pieces]
        self._ids[model.unknown_id] = self._unknown
        self._files = dict(files)
        self._takes_language_code = takes_language_code
        self._strips = strips
        ordered = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, ordered)))
        # A text without any of these characters holds no special token, and is not searched for each of them.
        self._marks = {next((c for c in "<_" if c in token), token[0]) for token in ordered}

    def vocabulary(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def token_to_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def id_to_token(self, id: int) -> str | None:
        return self._tokens.get(id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        row: list[int] = []
        if self._takes_language_code and text.startswith(">>"):
            end = text.find("<<") + 2
            if end > 1:
                row.append(self._vocabulary.get(text[:end], self._unknown))
                text = text[end:]
        if any(mark in text for mark in self._marks):
            start = 0
            for match in self._special.finditer(text):
                row += [*self._plain(text[start : match.start()]), self._vocabulary[match[0]]]
                start = match.end()
            text = text[start:]
        return row + self._plain(text)

    def _plain(self, text: str) -> list[int]:
        normal, segments = self._model.segment(text)
        ids = self._ids
        if self._model.unknown_id not in segments:
            return [ids[i] for i in segments]
        row: list[int] = []
        place, run = 0, ""
        for i in segments:
            if i == self._model.unknown_id:  # one character; a run of them may be a token that only the family knows
                run += normal[place]
                place += 1
                continue
            if run:
                row.append(self._vocabulary.get(run, self._unknown))
                run = ""
            row.append(ids[i])
            place += len(self._model.pieces[i])
        return [*row, self._vocabulary.get(run, self._unknown)] if run else row

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        skipped = self.special_ids
        texts = []
        for row in rows:
            tokens = (self._tokens.get(i) for i in row if i not in skipped)
            text = self._model.decode([token for token in tokens if token is not None])
            texts.append(text.strip() if self._strips else text)
        return texts

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


class ByteBackend:
    """ByT5: the UTF-8 bytes of a text, behind <pad>, </s> and <unk>; then `extra_ids` sentinels."""

    def __init__(self, extra_ids: int) -> None:
        self.prefix_ids: list[int] = []
        self.suffix_ids = [1]
        self._special = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"<extra_id_{i}>": 259 + i for i in range(extra_ids)}
        self.special_ids = set(self._special.values())
        self._vocabulary = self._special | {chr(byte): byte + 3 for byte in range(256)}
        self._tokens = {i: token for token, i in self._vocabulary.items()}
        # transformers takes the spaces around the first three away.
        self._pattern = re.compile(r"\s*(?:<pad>|</s>|<unk>)\s*|<extra_id_\d+>")

    def vocabulary(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def token_to_id(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def id_to_token(self, id: int) -> str | None:
        return self._tokens.get(id)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        row: list[int] = []
        start = 0
        for match in self._pattern.finditer(text) if "<" in text else ():
            special = self._special.get(match[0].strip())
            if special is not None:
                row += [*(byte + 3 for byte in text[start : match.start()].encode()), special]
                start = match.end()
        return row + [byte + 3 for byte in text[start:].encode()]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return [bytes(i - 3 for i in row if 3 <= i < 259).decode(errors="ignore") for row in rows]

    def files(self) -> dict[str, bytes]:
        return {}


def read_family(path: Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> tuple[Backend, ...] | None:
    """The backend of source texts, and that of target texts where it is another one; None if no file is there.

    names: what `tokenizer_config.json` and `special_tokens_map.json` hold. Raises PresetError and
    UnsupportedModelError for files that cannot be used.
    """
    if "ByT5Tokenizer" in (names.get("tokenizer_class"), config.get("tokenizer_class")):
        return (ByteBackend(_extra_ids(names, 125)),)
    if (path / "source.spm").exists() and (path / "target.spm").exists():
        return _marian(path, names)
    if (path / _FAIRSEQ).exists():
        data = {_FAIRSEQ: read_capped(path / _FAIRSEQ)}
        model = SentencePieceModel(data[_FAIRSEQ])
        if (path / "vocab.json").exists():
            return (_m2m100(path, model, data, names),)
        return (_fairseq(model, data, config, names),)
    for file in _SPIECE:
        if (path / file).exists():
            data = {file: read_capped(path / file)}
            pegasus = config.get("model_type") in ("pegasus", "pegasus_x", "bigbird_pegasus")
            return ((_pegasus if pegasus else _t5)(SentencePieceModel(data[file]), data, names),)
    return None


def _t5(model: SentencePieceModel, files: Mapping[str, bytes], names: Mapping[str, Any]) -> Backend:
    vocabulary = dict(model.ids)
    extra = [] if "<extra_id_0>" in vocabulary else [f"<extra_id_{i}>" for i in range(_extra_ids(names, 100))]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(reversed(extra))}
    return _backend(model, vocabulary, [*extra, *_controls(model)], ([], ["</s>"]), files, names)


def _pegasus(model: SentencePieceModel, files: Mapping[str, bytes], names: Mapping[str, Any]) -> Backend:
    """<pad> and </s> are SentencePiece's own first two; between them and the rest stand tokens of pre-training."""
    offset = names.get("offset", 103)
    if not isinstance(offset, int) or not 0 <= offset <= _MAX_EXTRA_IDS:
        raise PresetError(f"offset in tokenizer_config.json must be the number of tokens set in. Received: {offset!r}")
    own = ["<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, offset))] if offset else []
    first = model.pieces[:2]
    vocabulary = {piece: i + offset for piece, i in model.ids.items()}
    vocabulary |= {token: i for i, token in enumerate([*first, *own])}
    return _backend(model, vocabulary, [*own, *_controls(model)], ([], ["</s>"]), files, names)


def _fairseq(
    model: SentencePieceModel, files: Mapping[str, bytes], config: Mapping[str, Any], names: Mapping[str, Any]
) -> Backend:
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {piece: i + 1 for i, piece in enumerate(model.pieces) if i >= 3}
    size = len(model.pieces) + 1
    if config.get("model_type") == "mbart":
        is_mbart50 = str(names.get("tokenizer_class")).startswith("MBart50")
        is_mbart50 |= config.get("vocab_size") == size + len(MBART_50_LANGUAGES) + 1
        languages = MBART_50_LANGUAGES if is_mbart50 else MBART_25_LANGUAGES
        own, prefixed = "en_XX", is_mbart50
    else:
        listed = [token_name(token) or "" for token in names.get("additional_special_tokens") or ()]
        languages = [
            token for token in listed if token and re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", token)
        ] or NLLB_LANGUAGES
        own, prefixed = "eng_Latn", names.get("legacy_behaviour") is not True
    vocabulary |= {token: size + i for i, token in enumerate([*languages, "<mask>"])}
    language = str(names.get("src_lang"))
    language = language if language in languages else own
    wrap = ([language], ["</s>"]) if prefixed else ([], ["</s>", language])
    return _backend(model, vocabulary, ["<s>", "<pad>", *languages, "<mask>"], wrap, files, names)


def _m2m100(path: Path, model: SentencePieceModel, files: Mapping[str, bytes], names: Mapping[str, Any]) -> Backend:
    vocabulary = _vocabulary(path / "vocab.json")
    codes = WMT21_LANGUAGES if names.get("language_codes") == "wmt21" else M2M100_LANGUAGES
    languages = [f"__{code}__" for code in codes]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(languages)}
    language = f"__{names.get('src_lang')}__"
    wrap = ([language if language in vocabulary else "__en__"], ["</s>"])
    files = {**files, "vocab.json": read_capped(path / "vocab.json")}
    return _backend(model, vocabulary, ["<s>", "<pad>", *languages], wrap, files, names, strips=True)


def _marian(path: Path, names: Mapping[str, Any]) -> tuple[Backend, ...]:
    separate = names.get("separate_vocabs") is True
    wanted = ["source.spm", "target.spm", "vocab.json"] + ["target_vocab.json"] * separate
    files = {name: read_capped(path / name) for name in wanted}
    backends = []
    for side in ("source", "target"):
        vocabulary = _vocabulary(path / ("target_vocab.json" if separate and side == "target" else "vocab.json"))
        model = SentencePieceModel(files[f"{side}.spm"])
        options = {"takes_language_code": True, "strips": True}
        backends.append(_backend(model, vocabulary, ["<pad>"], ([], ["</s>"]), files, names, **options))
    return tuple(backends)


def _backend(
    model: SentencePieceModel,
    vocabulary: dict[str, int],
    special: Sequence[str],
    wrap: tuple[Sequence[str], Sequence[str]],
    files: Mapping[str, bytes],
    names: Mapping[str, Any],
    **options: bool,
) -> Backend:
    """With what every family has: </s> and <unk>, and tokens that were added later."""
    added: dict[str, int] = {}
    listed = names.get("added_tokens_decoder")
    for key, value in listed.items() if isinstance(listed, Mapping) else ():
        token = token_name(value)
        number = int(key) if re.fullmatch("[0-9]{1,9}", str(key)) else None
        if token and token not in vocabulary and number is not None and number not in vocabulary.values():
            added[token] = number
    return SentencePieceBackend(
        model,
        vocabulary | added,
        dict.fromkeys([*special, "</s>", "<unk>", *added]),
        wrap,
        files,
        **options,
    )


def _controls(model: SentencePieceModel) -> list[str]:
    return [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == CONTROL]


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json_object(path)
    ids = list(vocabulary.values())
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids) or len(set(ids)) != len(
        ids
    ):
        raise PresetError(f"{path} must give every token an id of its own")
    return vocabulary


def _extra_ids(names: Mapping[str, Any], default: int) -> int:
    """How many sentinels `<extra_id_i>` there are: those that are listed, else as many as is said."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = names.get(key)
        found = (
            [token for token in listed if "<extra_id_" in str(token_name(token))] if isinstance(listed, list) else []
        )
        if found:
            return min(len(found), _MAX_EXTRA_IDS)
    number = names.get("extra_ids", default)
    if not isinstance(number, int) or not 0 <= number <= _MAX_EXTRA_IDS:
        raise PresetError(f"extra_ids in tokenizer_config.json must be 0 to {_MAX_EXTRA_IDS}. Received: {number!r}")
    return number
