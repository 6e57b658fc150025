"""What `Seq2SeqLM.generate` takes and gives: every form of input becomes rows, and the rows' answers take that form
again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import InputError, SettingsError
from s2s_ray.generation.requests import Finished, Generated, Request
from s2s_ray.generation.settings import FIELD_NAMES, GenerationSettings
from s2s_ray.text.inputs import LANGUAGE_KEYS, Lang, as_list, is_column
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """One output with `return_details`: finish_reason is "stop" or "length", score a sum of log-probabilities."""

    text: str
    score: float | None
    finish_reason: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Row:
    token_ids: Sequence[int]
    prompt_ids: Sequence[int] = ()
    start: int | None = None  # the first decoder token, where ids were given
    width: int | None = None  # the padded decoder length, where ids were given
    changes: Mapping[str, int] = field(default_factory=dict)  # settings that the row's languages decide


class _TextBatch(NamedTuple):
    sources: list[Any]
    prompts: list[Any]
    languages: Mapping[str, Lang] = {}  # the batch's own, by LANGUAGE_KEYS


class Calls:
    """Makes requests of rows, with the settings of one `generate` call; a list as a setting's value has one per row."""

    def __init__(
        self,
        base: GenerationSettings,
        stop_token_ids: Any,
        settings: Mapping[str, Any],
        row_ids: Sequence[int] | None,
        *,
        default_max_length: int | None,
    ) -> None:
        unknown = sorted(set(settings) - FIELD_NAMES)
        if unknown:
            raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}; see its docstring")
        self._base = base
        self._stops = stop_token_ids
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._row_ids = row_ids
        self._default_max_length = default_max_length
        self._known: dict[tuple[Any, ...], GenerationSettings] = {}

    def requests(self, rows: Iterable[_Row]) -> Iterator[Request]:
        """One request per row, keyed by its place."""
        count = 0
        for index, row in enumerate(rows):
            row_id = index if self._row_ids is None else _pick("row_ids", self._row_ids, index)
            yield Request(int(row_id), row.token_ids, self._for_row(index, row), row.prompt_ids, index)
            count += 1
        for name, value in self._settings.items():
            if _is_per_row(name, value) and len(value) != count:
                raise SettingsError(f"{name} must have one value per row. Received: {len(value)} for {count} rows")

    def _for_row(self, index: int, row: _Row) -> GenerationSettings:
        changes: dict[str, Any] = dict(row.changes)
        for name, value in self._settings.items():
            changes[name] = _pick(name, value, index) if _is_per_row(name, value) else value
        stops = self._stop_ids(index)
        if stops is not None:
            changes["eos_token_id"] = stops
        if row.start is not None:
            changes["decoder_start_token_id"] = row.start
        if changes.get("max_length") is not None and changes.get("max_new_tokens") is None:
            changes["max_new_tokens"] = None  # the call's limit wins over the preset's other way to say it
        elif self._base.max_length is None and self._base.max_new_tokens is None and "max_new_tokens" not in changes:
            changes["max_length"] = row.width or self._default_max_length
        key = tuple(sorted((k, _hashable(v)) for k, v in changes.items()))
        if key not in self._known:
            self._known[key] = self._base.replace(**changes)
        return self._known[key]

    def _stop_ids(self, index: int) -> tuple[int, ...] | None:
        """The stop tokens of a row; None for the preset's own."""
        stops = self._stops
        if isinstance(stops, (list, tuple)) and any(isinstance(s, (list, tuple, str)) or s is None for s in stops):
            stops = _pick("stop_token_ids", stops, index)
        if isinstance(stops, str) and stops == "auto":
            if not self._base.eos_token_id:
                raise SettingsError('stop_token_ids="auto" needs a preset that names its end token: pass ids or None')
            return None
        if stops is None:
            return ()
        ids = (stops,) if isinstance(stops, (int, np.integer)) and not isinstance(stops, bool) else stops
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, (int, np.integer)) for i in ids):
            raise SettingsError(f'stop_token_ids must be "auto", None, an id or ids. Received: {self._stops!r}')
        return tuple(int(i) for i in ids)


_TUPLES = {"bad_words_ids": 2, "suppress_tokens": 1, "begin_suppress_tokens": 1, "eos_token_id": 1}


def _is_per_row(name: str, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > _TUPLES.get(name, 0)
    depth = 0
    while isinstance(value, (list, tuple)):
        depth += 1
        value = next((v for v in value if v is not None), None)
    return depth > _TUPLES.get(name, 0)


def _pick(name: str, values: Any, index: int) -> Any:
    if index >= len(values):
        raise SettingsError(f"{name} must have one value per row. Received: {len(values)}, fewer than there are rows")
    value = values[index]
    return value.item() if isinstance(value, np.generic) else value


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple, np.ndarray)) else value


class TextInputs:
    """Rows read from text, answered with text."""

    def __init__(self, rows: Iterator[_Row], single: bool, decode: Callable[..., list[str]]) -> None:
        self.rows = rows
        self._single = single
        self._decode = decode

    def output(self, answers: list[Finished], *, strip_prompt: bool, scores: bool, details: bool, pad: int) -> Any:
        """The outputs of all rows, in order; see `Seq2SeqLM.generate`."""
        flat = [
            [*(() if strip_prompt else answer.request.prompt_ids), *sequence.token_ids]
            for answer in answers
            for sequence in answer.sequences
        ]
        texts = iter(self._decode(flat))
        outputs: list[Any] = []
        values: list[Any] = []
        for answer in answers:
            made = [_detailed(next(texts), s) if details else next(texts) for s in answer.sequences]
            single = answer.request.settings.num_return_sequences == 1
            outputs.append(made[0] if single else made)
            values.append(answer.sequences[0].score if single else [s.score for s in answer.sequences])
        if self._single:
            outputs, values = outputs[0], values[0]
        return (outputs, values) if scores else outputs


def _detailed(text: str, sequence: Generated) -> GeneratedText:
    return GeneratedText(text, sequence.score, sequence.finish_reason, len(sequence.token_ids))


class IdInputs:
    """Rows read from ids and masks, answered with ids and masks."""

    def __init__(self, rows: list[_Row]) -> None:
        self.rows: Iterator[_Row] = iter(rows)
        self._width = max((row.width or 0 for row in rows), default=0)

    def output(self, answers: list[Finished], *, strip_prompt: bool, scores: bool, details: bool, pad: int) -> Any:
        """`decoder_token_ids` int32 and `decoder_padding_mask` bool, `[B x num_return_sequences, T]`."""
        rows = [
            [
                *(() if strip_prompt else (a.request.settings.decoder_start_token_id, *a.request.prompt_ids)),
                *s.token_ids,
            ]
            for a in answers
            for s in a.sequences
        ]
        width = max([self._width, *(len(row) for row in rows)], default=0)
        ids = np.full((len(rows), width), pad, np.int32)
        mask = np.zeros((len(rows), width), bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = True
        outputs = {"decoder_token_ids": ids, "decoder_padding_mask": mask}
        return (outputs, [[s.score for s in a.sequences] for a in answers]) if scores else outputs


def read_inputs(
    inputs: Any, preprocessor: Seq2SeqLMPreprocessor | None, source_lang: Lang = None, target_lang: Lang = None
) -> TextInputs | IdInputs:
    """The rows of any form of input. Raises InputError for a form that is not known."""
    if isinstance(inputs, Mapping) and "encoder_token_ids" in inputs:
        if source_lang is not None or target_lang is not None:
            raise InputError("source_lang and target_lang go with text: ids are written for their languages already")
        return IdInputs(_id_rows(inputs))
    if preprocessor is None:
        raise InputError("a task without preprocessor takes a dictionary of encoder_token_ids (and masks), not text")
    batches, single = _text_batches(inputs)
    rows = _text_rows(batches, preprocessor, {"source_lang": source_lang, "target_lang": target_lang})
    return TextInputs(rows, single, preprocessor.decode)


def _text_rows(
    batches: Iterable[_TextBatch], preprocessor: Seq2SeqLMPreprocessor, languages: Mapping[str, Lang]
) -> Iterator[_Row]:
    done = 0
    for sources, prompts, given in batches:
        end = done + len(sources)
        own = {name: list(lang or ())[done:end] if is_column(lang) else lang for name, lang in languages.items()}
        if both := [name for name in given if own[name] is not None]:
            raise InputError(f"{both[0]} must be a key of the inputs or an argument of generate. Received: both")
        routes = preprocessor.routes(len(sources), **{**own, **given})
        encoded, _ = preprocessor.encode_sources(sources, routes=routes)
        starts = preprocessor.encode_prompts(prompts, routes=routes) if any(prompts) else [[]] * len(sources)
        for token_ids, prompt, route in zip(encoded, starts, routes, strict=True):
            yield _Row(token_ids, prompt, changes=route.generation_changes())
        done = end


def _text_batches(inputs: Any) -> tuple[Iterable[_TextBatch], bool]:
    if isinstance(inputs, (str, np.str_)):
        return [_TextBatch([str(inputs)], [""])], True
    if isinstance(inputs, Mapping):
        return _dictionary_batch(inputs)
    listed = _as_list(inputs)
    if listed is not None:
        return ([_TextBatch(listed, [""] * len(listed))] if listed else []), False
    if hasattr(inputs, "to_pydict"):  # an Arrow table or record batch
        return _dictionary_batch(inputs.to_pydict())
    if isinstance(inputs, Iterable):
        return chain.from_iterable(_text_batches(batch)[0] for batch in inputs), False
    raise InputError(
        "generate takes a string, strings, a dictionary of encoder_text and decoder_text, a dictionary of "
        f"encoder_token_ids, or an iterator of these. Received: {type(inputs).__name__}"
    )


def _dictionary_batch(inputs: Mapping[str, Any]) -> tuple[list[_TextBatch], bool]:
    if "encoder_text" not in inputs:
        raise InputError(f"the dictionary must hold encoder_text. Received keys: {sorted(map(str, inputs))}")
    single = isinstance(inputs["encoder_text"], (str, np.str_))
    sources = [str(inputs["encoder_text"])] if single else _as_list(inputs["encoder_text"])
    given = inputs.get("decoder_text")
    if sources is None:
        raise InputError(f"encoder_text must be a string or strings. Received: {type(inputs['encoder_text']).__name__}")
    prompts = [""] * len(sources) if given is None else ([str(given)] if isinstance(given, str) else _as_list(given))
    if prompts is None or len(prompts) != len(sources):
        raise InputError(f"decoder_text must be as many as encoder_text ({len(sources)}). Received: {given!r:.200}")
    named = {name: inputs[name] for name in LANGUAGE_KEYS if inputs.get(name) is not None}
    languages = {name: as_list(lang)[0] if is_column(lang) else lang for name, lang in named.items()}
    return [_TextBatch(sources, prompts, languages)] if sources else [], single


def _as_list(texts: Any) -> list[Any] | None:
    """A list of strings from a list, tuple, NumPy or Arrow array; None for anything else."""
    if hasattr(texts, "to_pylist") and not hasattr(texts, "to_pydict"):
        texts = texts.to_pylist()
    elif isinstance(texts, np.ndarray):
        texts = texts.ravel().tolist()
    if not isinstance(texts, (list, tuple)):
        return None
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            if isinstance(text, (Mapping, list, tuple)):
                return None  # a sequence of batches
            raise InputError(f"every text must be a string. Received: {type(text).__name__} at {index}")
    return [str(text) for text in texts]


def _id_rows(inputs: Mapping[str, Any]) -> list[_Row]:
    sources = _matrix("encoder_token_ids", inputs["encoder_token_ids"])
    mask = inputs.get("encoder_padding_mask")
    kept = np.ones(sources.shape, bool) if mask is None else _matrix("encoder_padding_mask", mask).astype(bool)
    targets = inputs.get("decoder_token_ids")
    if targets is None:
        return [_Row(row[keep].tolist()) for row, keep in zip(sources, kept, strict=True)]
    targets = _matrix("decoder_token_ids", targets)
    mask = inputs.get("decoder_padding_mask")
    prompt_mask = np.ones(targets.shape, bool) if mask is None else _matrix("decoder_padding_mask", mask).astype(bool)
    if kept.shape != sources.shape or prompt_mask.shape != targets.shape or len(targets) != len(sources):
        raise InputError("ids and masks must be [B, S] and [B, T], each mask of its ids' shape")
    rows = []
    for row, keep, target, prompt_keep in zip(sources, kept, targets, prompt_mask, strict=True):
        prompt = target[prompt_keep].tolist()
        if not prompt:
            raise InputError("decoder_token_ids must hold at least the start token in every row")
        rows.append(_Row(row[keep].tolist(), prompt[1:], prompt[0], targets.shape[1]))
    return rows


def _matrix(name: str, value: Any) -> NDArray[Any]:
    array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise InputError(f"{name} must be whole numbers of shape [B, T]. Received: {array.dtype} {array.shape}")
    return array
