"""Text to the ids and masks an encoder-decoder takes, and back. numpy only; the caller makes tensors."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import (
    InputError,
    LanguageError,
    PresetError,
    PresetIntegrityError,
    RowErrorReason,
    SettingsError,
)
from s2s_ray.storage import canonical_json
from s2s_ray.text.inputs import Lang, is_column, language_pairs, languages, read_texts, to_array
from s2s_ray.text.languages import NO_ROUTE, Languages, Route
from s2s_ray.text.tokenizer import TokenizationError, Tokenizer, read_json_object

PREPROCESSOR_FILE = "preprocessor.json"
DEFAULT_SEQUENCE_LENGTH = 1024
DEFAULT_MAX_TEXT_BYTES = 2**20


@dataclass(slots=True)
class EncodedSource:
    """One source text as ids, or the reason why not. `num_tokens_full` counts the tokens before truncation."""

    token_ids: list[int] = field(default_factory=list)
    truncated: bool = False
    num_tokens_full: int = 0
    error: RowErrorReason | None = None
    message: str = ""


class Seq2SeqLMPreprocessor:
    """KerasHub's `Seq2SeqLMPreprocessor`: dictionaries of text in, dictionaries of ids and masks out.

    Ids are int32 and masks bool, both [B, S]. Rows are padded to the longest row of the batch; `padding="max_length"`
    pads to the sequence length as KerasHub does. `source_prefix` is put before every source text (T5's "summarize: ").
    A text of more than `max_text_bytes` UTF-8 bytes is refused before it is tokenised.

    `source_lang` and `target_lang` name languages as `s2s_ray.text.languages` says: here as defaults, in every method
    for all its texts or, as a list, one per text (None: the default). A language's own text prefix takes the place of
    `source_prefix`. A code that the preset does not know raises LanguageError.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder_sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
        decoder_sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
        *,
        decoder_start_token_id: int,
        source_prefix: str = "",
        max_text_bytes: int = DEFAULT_MAX_TEXT_BYTES,
        padding: Literal["longest", "max_length"] = "longest",
        languages: Languages | None = None,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> None:
        if padding not in ("longest", "max_length"):
            raise SettingsError(f'padding must be "longest" or "max_length". Received: {padding!r}')
        if not isinstance(source_prefix, str):
            raise SettingsError(f"source_prefix must be a string. Received: {source_prefix!r}")
        if not _is_int(decoder_start_token_id) or decoder_start_token_id < 0:
            raise SettingsError(f"decoder_start_token_id must be a token id. Received: {decoder_start_token_id!r}")
        self.tokenizer = tokenizer
        self.decoder_start_token_id = decoder_start_token_id
        self.source_prefix = source_prefix
        self.max_text_bytes = _positive("max_text_bytes", max_text_bytes)
        self.padding = padding
        self.languages = languages
        self.source_lang, self.target_lang = source_lang, target_lang
        self.route()  # refuses languages that the preset does not know
        self.encoder_sequence_length = self._length("encoder_sequence_length", encoder_sequence_length)
        self.decoder_sequence_length = self._length("decoder_sequence_length", decoder_sequence_length)
        self.truncated_sources = 0
        self.truncated_targets = 0

    @property
    def sequence_length(self) -> int:
        """KerasHub's alias of `decoder_sequence_length`."""
        return self.decoder_sequence_length

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], **kwargs: Any) -> "Seq2SeqLMPreprocessor":
        """The preprocessor of a preset (any handle `s2s_ray.presets` knows); keywords as for `from_directory`."""
        from s2s_ray import presets

        return cls.from_directory(presets.resolve(preset).directory, **kwargs)

    @classmethod
    def from_directory(
        cls,
        path: Path,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        source_prefix: str | None = None,
        max_text_bytes: int | None = None,
        padding: Literal["longest", "max_length"] | None = None,
        source_lang: str | None = None,
        target_lang: str | None = None,
    ) -> "Seq2SeqLMPreprocessor":
        """Arguments win over `preprocessor.json`, that wins over the number of positions in `config.json`, else 1024.

        Raises PresetError for unusable files, PresetIntegrityError for another model's tokenizer.
        """
        path = Path(path)
        config = read_json_object(path / "config.json")
        settings: dict[str, Any] = {
            "encoder_sequence_length": _positions(config, "encoder"),
            "decoder_sequence_length": _positions(config, "decoder"),
        }
        saved = read_json_object(path / PREPROCESSOR_FILE)
        settings.update({name: saved[name] for name in _SAVED if name in saved})
        given = {
            "encoder_sequence_length": encoder_sequence_length,
            "decoder_sequence_length": decoder_sequence_length,
            "source_prefix": source_prefix,
            "max_text_bytes": max_text_bytes,
            "padding": padding,
            "source_lang": source_lang,
            "target_lang": target_lang,
        }
        settings.update({name: value for name, value in given.items() if value is not None})
        if settings.get("decoder_start_token_id") is None:
            settings["decoder_start_token_id"] = _decoder_start(path, config)
        tokenizer = Tokenizer.from_directory(path)
        languages = Languages.of_preset(tokenizer, config, tokenizer.config, saved.get("languages"))
        return cls(tokenizer, languages=languages, **settings)

    def save(self, directory: Path) -> None:
        """Write `preprocessor.json` and the tokenizer's files."""
        self.tokenizer.save(directory)
        saved = {name: getattr(self, name) for name in _SAVED}
        if self.languages is not None:
            saved["languages"] = self.languages.to_config()
        (directory / PREPROCESSOR_FILE).write_bytes(canonical_json(saved))

    def route(self, source_lang: str | None = None, target_lang: str | None = None) -> Route:
        """How texts of these languages are written; its `generation_changes()` belong into the rows' settings.

        None takes the preprocessor's default. Raises LanguageError for a language that the preset does not know.
        """
        source, target = source_lang or self.source_lang, target_lang or self.target_lang
        if source is None and target is None:
            return NO_ROUTE
        if self.languages is None:
            raise LanguageError(
                f"source_lang and target_lang must be left out: this preset has no languages. Received: {source!r} and "
                f"{target!r}. One that has them declares them in {PREPROCESSOR_FILE} (docs/tokenizers.md)"
            )
        return self.languages.route(source, target)

    def routes(self, rows: int, source_lang: Lang = None, target_lang: Lang = None) -> list[Route]:
        """One route per row. Raises LanguageError as `route`, and SettingsError for lists of another length."""
        routes = self.try_routes(rows, source_lang, target_lang)
        for row, route in enumerate(routes):
            if route.error:
                raise LanguageError(f"row {row}: {route.error}")
        return routes

    def try_routes(self, rows: int, source_lang: Lang = None, target_lang: Lang = None) -> list[Route]:
        """As `routes`, but where languages come as a list, a row with an unknown one has a route with an `error`."""
        if not is_column(source_lang) and not is_column(target_lang):
            return [self.route(source_lang, target_lang)] * rows  # type: ignore[arg-type]
        routes = []
        for source, target in language_pairs(rows, source_lang, target_lang):
            try:
                routes.append(self.route(source, target))
            except LanguageError as error:
                routes.append(Route(error=str(error)))
        return routes

    def __call__(
        self,
        x: Mapping[str, Any],
        y: Any = None,
        sample_weight: Any = None,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.int32], NDArray[np.bool_]]:
        """(x, y, sample_weight) for training from `encoder_text` and `decoder_text`.

        y [B, T] is the target with its special tokens (BART: <s> text </s>); the decoder's input is y shifted right
        behind the start token; sample_weight [B, T] is True at real targets. A single string gives unbatched arrays.
        x may hold `source_lang` and `target_lang` too. Raises TokenizationError for a text that cannot be used,
        InputError for missing keys, LanguageError for an unknown language.
        """
        if y is not None or sample_weight is not None:
            raise InputError("y and sample_weight must be None: both are made from decoder_text")
        sources, targets, batched = read_texts(x, need_decoder=True)
        routes = self.routes(len(sources), **languages(x))
        encoder_length = encoder_sequence_length or self.encoder_sequence_length
        decoder_length = decoder_sequence_length or sequence_length or self.decoder_sequence_length
        labels = self.encode_targets(targets, decoder_length, routes)
        decoder = [[start, *row] for start, row in zip(self.decoder_starts(routes), labels, strict=True)]
        decoder_ids, decoder_mask = self._pad(decoder, decoder_length + 1, minimum=2)
        inputs = self._encoder_inputs(sources, encoder_length, routes)
        inputs |= {"decoder_token_ids": decoder_ids[:, :-1], "decoder_padding_mask": decoder_mask[:, :-1]}
        result = inputs, decoder_ids[:, 1:], decoder_mask[:, 1:]
        if batched:
            return result
        return {name: array[0] for name, array in inputs.items()}, result[1][0], result[2][0]

    def generate_preprocess(
        self,
        x: Any,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Ids and masks for generation from a string, strings, or a dictionary of `encoder_text` [and `decoder_text`,
        `source_lang`, `target_lang`].

        The decoder's ids are the start token and the prompt, without an end token; an empty prompt is the start token
        alone, so that a model's forced first token applies, or with it the target language's token where it is forced.
        """
        x = x if isinstance(x, Mapping) else {"encoder_text": x}
        sources, prompts, batched = read_texts(x)
        routes = self.routes(len(sources), **languages(x))
        decoder_length = decoder_sequence_length or sequence_length or self.decoder_sequence_length
        prompt_ids = self.encode_prompts(prompts, decoder_length - 1, routes)
        decoder = []
        for start, prompt, route in zip(self.decoder_starts(routes), prompt_ids, routes, strict=True):
            forced = [] if prompt or route.forced_bos_token_id is None else [route.forced_bos_token_id]
            decoder.append([start, *forced, *prompt])
        decoder_ids, decoder_mask = self._pad(decoder, decoder_length)
        inputs = self._encoder_inputs(sources, encoder_sequence_length or self.encoder_sequence_length, routes)
        inputs |= {"decoder_token_ids": decoder_ids, "decoder_padding_mask": decoder_mask}
        return inputs if batched else {name: array[0] for name, array in inputs.items()}

    def generate_postprocess(self, x: Mapping[str, Any]) -> str | list[str]:
        """Text from `decoder_token_ids` and `decoder_padding_mask`; special tokens and padding are left out."""
        ids, mask = to_array(x["decoder_token_ids"]), to_array(x["decoder_padding_mask"]).astype(bool)
        if ids.shape != mask.shape or ids.ndim not in (1, 2):
            raise InputError(f"ids and mask must be [T] or [B, T] and alike. Received: {ids.shape} and {mask.shape}")
        if ids.ndim == 1:
            return self.tokenizer.target.decode_batch([ids[mask].tolist()])[0]
        return self.tokenizer.target.decode_batch([row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])

    def encode_sources(
        self, texts: Sequence[str], max_length: int | None = None, routes: Sequence[Route] | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """(ragged ids with special tokens, which rows were cut to `max_length` tokens).

        Raises TokenizationError for the first text that cannot be encoded.
        """
        encoded = self.try_encode_sources(texts, max_length, routes)
        for row, source in enumerate(encoded):
            if source.error is not None:
                raise TokenizationError(row, source.error, source.message)
        return [source.token_ids for source in encoded], [source.truncated for source in encoded]

    def try_encode_sources(
        self, texts: Sequence[Any], max_length: int | None = None, routes: Sequence[Route] | None = None
    ) -> list[EncodedSource]:
        """As `encode_sources`, but a row that cannot be encoded carries its reason and disturbs no other row.

        routes: of each text's languages, from `routes` or `try_routes`; without, of the preprocessor's own.
        """
        limit = self._length("max_length", max_length) if max_length is not None else self.encoder_sequence_length
        routes = self.routes(len(texts)) if routes is None else routes
        encoded = [_unencoded(route) for route in routes]
        prefixes = [self.source_prefix if route.text_prefix is None else route.text_prefix for route in routes]
        rows = self._try_encode(texts, encoded, prefixes, self.tokenizer)
        for source, ids, route in zip(encoded, rows, routes, strict=True):
            if ids is not None:
                source.token_ids, source.num_tokens_full = self._wrapped(ids, limit, route.source_wrap)
                source.truncated = source.num_tokens_full > limit
        self.truncated_sources += sum(source.truncated for source in encoded)
        return encoded

    def encode_targets(
        self, texts: Sequence[str], max_length: int | None = None, routes: Sequence[Route] | None = None
    ) -> list[list[int]]:
        """Labels: ragged ids with special tokens, cut to `max_length` tokens with the end token kept."""
        limit = self._length("max_length", max_length) if max_length is not None else self.decoder_sequence_length
        routes = self.routes(len(texts)) if routes is None else routes
        rows = self._encode(texts)
        own = self.tokenizer.target.prefix_ids, self.tokenizer.target.suffix_ids
        wrapped = [self._wrapped(ids, limit, route.target_wrap or own) for ids, route in zip(rows, routes, strict=True)]
        self.truncated_targets += sum(full > limit for _, full in wrapped)
        return [ids for ids, _ in wrapped]

    def encode_prompts(
        self, texts: Sequence[str], max_length: int | None = None, routes: Sequence[Route] | None = None
    ) -> list[list[int]]:
        """Decoder text after the start token, without an end token (BART: <s> text), cut to `max_length`; [] for ""."""
        limit = self.decoder_sequence_length - 1 if max_length is None else max_length
        routes = self.routes(len(texts)) if routes is None else routes
        rows = []
        for ids, route in zip(self._encode(texts), routes, strict=True):
            prefix = self.tokenizer.target.prefix_ids if route.target_wrap is None else route.target_wrap[0]
            rows.append([*prefix, *ids] if ids else [])
        self.truncated_targets += sum(len(row) > limit for row in rows)
        return [row[:limit] for row in rows]

    def decoder_starts(self, routes: Sequence[Route]) -> list[int]:
        """The token that the decoder of each row starts from."""
        own = (route.decoder_start_token_id for route in routes)
        return [self.decoder_start_token_id if start is None else start for start in own]

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """One text per sequence of ids, special tokens left out."""
        return self.tokenizer.target.decode_batch(ids)

    def _encode(self, texts: Sequence[Any]) -> list[list[int]]:
        outcomes = [EncodedSource() for _ in texts]
        rows = self._try_encode(texts, outcomes, [""] * len(outcomes), self.tokenizer.target)
        for row, outcome in enumerate(outcomes):
            if outcome.error is not None:
                raise TokenizationError(row, outcome.error, outcome.message)
        return [ids if ids is not None else [] for ids in rows]

    def _try_encode(
        self, texts: Sequence[Any], outcomes: list[EncodedSource], prefixes: Sequence[str], tokenizer: Tokenizer
    ) -> list[list[int] | None]:
        """Plain ids per text; None where `outcomes` has or was given an error."""
        good: list[int] = []
        strings: list[str] = []
        for row, (text, prefix) in enumerate(zip(texts, prefixes, strict=True)):
            if outcomes[row].error is not None:
                continue
            problem = self._problem(text)
            if problem is None:
                good.append(row)
                strings.append(prefix + (text.decode() if isinstance(text, bytes) else text))
            else:
                outcomes[row].error, outcomes[row].message = problem
        result: list[list[int] | None] = [None] * len(outcomes)
        try:
            encoded: list[list[int] | None] = [*tokenizer.encode_batch(strings, add_special_tokens=False)]
        except TokenizationError:
            encoded = [_encode_alone(tokenizer, text, outcomes[row]) for row, text in zip(good, strings, strict=True)]
        for row, ids in zip(good, encoded, strict=True):
            result[row] = ids
        return result

    def _problem(self, text: Any) -> tuple[RowErrorReason, str] | None:
        if text is None or (isinstance(text, float) and text != text):
            return RowErrorReason.NULL_TEXT, "the text is null"
        if not isinstance(text, (str, bytes)):
            return RowErrorReason.TOKENIZER_FAILED, f"a text must be a string. Received: {type(text).__name__}"
        try:
            if isinstance(text, bytes):
                size = len(text)
                text.decode()
            else:
                size = len(text) if text.isascii() else len(text.encode())
        except UnicodeError as error:
            return RowErrorReason.INVALID_UTF8, str(error)[:200]
        if size > self.max_text_bytes:
            return (
                RowErrorReason.TOO_LONG,
                f"{size} bytes; max_text_bytes is {self.max_text_bytes}",
            )
        return None

    def _wrapped(
        self, ids: list[int], limit: int, wrap: tuple[Sequence[int], Sequence[int]] | None
    ) -> tuple[list[int], int]:
        """(ids with special tokens within `limit`, their number without a limit)."""
        prefix, suffix = wrap or (self.tokenizer.prefix_ids, self.tokenizer.suffix_ids)
        overhead = len(prefix) + len(suffix)
        if limit <= overhead:
            raise SettingsError(f"lengths must be more than the {overhead} special tokens of a text. Received: {limit}")
        return [*prefix, *ids[: limit - overhead], *suffix], len(ids) + overhead

    def _encoder_inputs(self, texts: Sequence[str], length: int, routes: Sequence[Route]) -> dict[str, NDArray[Any]]:
        ids, mask = self._pad(self.encode_sources(texts, length, routes)[0], length)
        return {"encoder_token_ids": ids, "encoder_padding_mask": mask}

    def _pad(
        self, rows: Sequence[Sequence[int]], length: int, minimum: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        width = length if self.padding == "max_length" else max([len(row) for row in rows], default=minimum)
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id, dtype=np.int32)
        mask = np.arange(width) < np.array([len(row) for row in rows], dtype=np.int64)[:, None]
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        return ids, mask

    def _length(self, name: str, value: int) -> int:
        overhead = len(self.tokenizer.prefix_ids) + len(self.tokenizer.suffix_ids)
        if _positive(name, value) <= overhead:
            raise SettingsError(f"{name} must be more than the {overhead} special tokens of a text. Received: {value}")
        return value


_SAVED = (
    "encoder_sequence_length",
    "decoder_sequence_length",
    "decoder_start_token_id",
    "source_prefix",
    "max_text_bytes",
    "padding",
    "source_lang",
    "target_lang",
)


def _encode_alone(tokenizer: Tokenizer, text: str, outcome: EncodedSource) -> list[int] | None:
    try:
        return tokenizer(text)
    except TokenizationError as error:
        outcome.error, outcome.message = error.reason, str(error)
        return None


def _unencoded(route: Route) -> EncodedSource:
    return EncodedSource(error=RowErrorReason.UNKNOWN_LANGUAGE if route.error else None, message=route.error)


def _positions(config: Mapping[str, Any], side: str) -> int:
    for name in (f"max_{side}_position_embeddings", "max_position_embeddings"):
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_SEQUENCE_LENGTH


def _decoder_start(path: Path, config: Mapping[str, Any]) -> int:
    rows = config.get("decoder_vocab_size", config.get("vocab_size"))
    found = [c.get("decoder_start_token_id") for c in (config, read_json_object(path / "generation_config.json"))]
    for value in filter(_is_int, found):
        if _is_int(rows) and value >= rows:  # on a GPU it would kill each replica that uses it
            raise PresetIntegrityError(
                f"decoder_start_token_id must be below the model's vocabulary size {rows}. Received: {value}"
            )
    start = next(filter(_is_int, found), None)
    if start is None:
        raise PresetError(f"{path / 'config.json'} must hold decoder_start_token_id, the token generation starts from")
    return int(start)


def _positive(name: str, value: int) -> int:
    if not _is_int(value) or value < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1. Received: {value!r}")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
