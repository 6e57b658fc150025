"""What `fit` accepts as data, brought to one shape: batches of an epoch, and how many there are."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.errors import InputError, LanguageError, SettingsError
from s2s_ray.storage import Location
from s2s_ray.text.inputs import LANGUAGE_KEYS, Lang, is_column
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import TokenizationError
from s2s_ray.training.batches import Batch, BatchPlan, Examples, Ragged

CHUNK_ROWS = 2048  # rows tokenised at a time
TEXT_KEYS = ("encoder_text", "decoder_text")
FORMS = (
    "a dict of encoder_text and decoder_text (lists, arrays, Arrow columns), a pyarrow Table, Parquet paths, a dict of "
    "preprocessed arrays with y, or an iterable (DataLoader) of such dicts, tables or of (x, y, sample_weight)"
)


class Texts(NamedTuple):
    """Pairs of texts, and their languages: one for all, or one per pair."""

    encoder_text: Sequence[Any]
    decoder_text: Sequence[Any]
    source_lang: Lang = None
    target_lang: Lang = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """How data is read and batched. Lengths are in tokens; None takes the preprocessor's."""

    text_column: str = "encoder_text"
    summary_column: str = "decoder_text"
    source_lang_column: str | None = None
    target_lang_column: str | None = None
    batch_size: int = 32
    batch_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    max_source_length: int | None = None
    max_target_length: int | None = None

    def columns(self) -> list[str]:
        """What is read of a table: source, target, and the languages' columns where they are named."""
        languages = (self.source_lang_column, self.target_lang_column)
        return [self.text_column, self.summary_column, *(name for name in languages if name is not None)]

    def for_validation(self, batch_size: int | None) -> "DataSettings":
        """In order, and with batches of `batch_size` rows where it is given."""
        size, tokens = (batch_size, None) if batch_size else (self.batch_size, self.batch_tokens)
        return replace(self, batch_size=size, batch_tokens=tokens, shuffle=False)


@runtime_checkable
class TrainingData(Protocol):
    """Batches, epoch after epoch."""

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, on the CPU."""

    def steps(self, epoch: int) -> int | None:
        """How many batches the epoch has; None when that shows only at its end."""


@dataclass(slots=True)
class InMemory:
    """Tokenised pairs, held as ids."""

    examples: Examples
    settings: DataSettings
    _planned: dict[int, list[Any]] = field(default_factory=dict)

    def batches(self, epoch: int) -> Iterator[Batch]:
        for rows in self._plan(epoch):
            yield self.examples.collate(rows)

    def steps(self, epoch: int) -> int | None:
        return len(self._plan(epoch))

    def split(self, fraction: float) -> tuple["InMemory", "InMemory"]:
        """Without the last `fraction` of the rows, and those alone, as Keras splits: before any shuffling."""
        cut = _split_at(len(self.examples), fraction)
        last = self.examples.slice(cut, len(self.examples))
        return InMemory(self.examples.slice(0, cut), self.settings), InMemory(last, self.settings)

    def _plan(self, epoch: int) -> list[Any]:
        if epoch not in self._planned:
            s = self.settings
            lengths = self.examples.sources.lengths, self.examples.labels.lengths
            plan = BatchPlan(*lengths, s.batch_size, s.batch_tokens, s.shuffle, s.seed, epoch=epoch)
            self._planned = {epoch: plan.batches()}
        return self._planned[epoch]


@dataclass(slots=True)
class Preprocessed:
    """Arrays that the preprocessor made, one row an example: a dict `x`, labels `y`, weights."""

    x: dict[str, Any]
    y: Any
    sample_weight: Any
    settings: DataSettings

    def batches(self, epoch: int) -> Iterator[Batch]:
        ones = np.ones(len(self.y), dtype=np.int64)
        plan = BatchPlan(
            ones, ones, self.settings.batch_size, None, self.settings.shuffle, self.settings.seed, epoch=epoch
        )
        for rows in plan.batches():
            weight = None if self.sample_weight is None else self.sample_weight[rows]
            yield Batch.from_arrays({k: v[rows] for k, v in self.x.items()}, self.y[rows], weight)

    def steps(self, epoch: int) -> int | None:
        return -(-len(self.y) // self.settings.batch_size)

    def split(self, fraction: float) -> tuple["Preprocessed", "Preprocessed"]:
        """As InMemory.split."""
        cut = _split_at(len(self.y), fraction)
        first, last = slice(0, cut), slice(cut, None)
        return self._part(first), self._part(last)

    def _part(self, rows: slice) -> "Preprocessed":
        weight = None if self.sample_weight is None else self.sample_weight[rows]
        return replace(self, x={k: v[rows] for k, v in self.x.items()}, y=self.y[rows], sample_weight=weight)


@dataclass(slots=True)
class Stream:
    """An iterable whose items are batches, or single text rows that are gathered to `batch_size`."""

    items: Iterable[Any]
    encode: Callable[[Texts], Examples]
    settings: DataSettings

    def batches(self, epoch: int) -> Iterator[Batch]:
        iterator = iter(self.items)
        for item in iterator:
            if isinstance(item, Mapping) and isinstance(item.get("encoder_text"), (str, bytes)):
                more = itertools.islice(iterator, self.settings.batch_size - 1)
                rows = [item, *more]
                named = [key for key in LANGUAGE_KEYS if any(key in row for row in rows)]
                item = {key: [row[key] for row in rows] for key in TEXT_KEYS}
                item |= {key: [row.get(key) for row in rows] for key in named}
            yield self._batch(item)

    def steps(self, epoch: int) -> int | None:
        return len(self.items) if isinstance(self.items, Sized) else None

    def _batch(self, item: Any) -> Batch:
        if isinstance(item, Batch):
            return item
        if isinstance(item, (tuple, list)) and 1 <= len(item) <= 3 and isinstance(item[0], Mapping):
            x, y, weight = (*item, None, None)[:3]
            if y is not None:
                return Batch.from_arrays(x, y, weight)
            item = x
        texts = _as_texts(item, self.settings)
        if texts is None:
            raise InputError(
                f"an item of the data must be a batch of text or (x, y, sample_weight). Received: {type(item)}"
            )
        examples = self.encode(texts)
        return examples.collate(range(len(examples)))


def open_data(
    x: Any, y: Any, sample_weight: Any, preprocessor: Seq2SeqLMPreprocessor | None, settings: DataSettings
) -> TrainingData:
    """The data behind whatever `fit` was given. Raises InputError, which lists the accepted forms."""
    if isinstance(x, TrainingData):
        return x

    def encode_batch(texts: Texts) -> Examples:
        return encode([texts], required(preprocessor), settings)

    if isinstance(x, Mapping) and "encoder_token_ids" in x:
        if y is None:
            raise InputError("preprocessed x must come with y, the labels [B, T]")
        arrays = {key: _to_array(value) for key, value in x.items()}
        weight = None if sample_weight is None else _to_array(sample_weight)
        return Preprocessed(arrays, _to_array(y), weight, settings)
    if y is not None or sample_weight is not None:
        raise InputError("y and sample_weight belong to preprocessed x; with text, the targets are decoder_text")
    chunks = _text_chunks(x, settings)
    if chunks is not None:
        examples = encode(chunks, required(preprocessor), settings)
        if not len(examples):
            raise InputError("the training data must hold at least one pair. Received: none")
        return InMemory(examples, settings)
    if not isinstance(x, Iterable) or isinstance(x, (str, bytes)):
        raise InputError(f"x must be {FORMS}. Received: {type(x).__name__}")
    if settings.batch_tokens is not None:
        raise SettingsError("batch_tokens needs data of known length: an iterable already decides its batches")
    return Stream(x, encode_batch, settings)


def _text_chunks(x: Any, settings: DataSettings) -> Iterable[Texts] | None:
    """Chunks of texts when x is text in memory or in files."""
    texts = _as_texts(x, settings)
    if texts is not None:
        return _chunked(texts)
    paths = [x] if isinstance(x, (str, os.PathLike)) else x
    if isinstance(paths, (list, tuple)) and paths and all(isinstance(p, (str, os.PathLike)) for p in paths):
        return itertools.chain.from_iterable(_read_parquet(path, settings) for path in paths)
    return None


def _as_texts(x: Any, settings: DataSettings) -> Texts | None:
    if isinstance(x, (pa.Table, pa.RecordBatch)):
        return from_columns(x, settings)
    if not isinstance(x, Mapping):
        return None
    if not set(TEXT_KEYS) <= set(x) <= {*TEXT_KEYS, *LANGUAGE_KEYS}:
        raise InputError(
            "x must have the keys encoder_text and decoder_text, and may have source_lang and target_lang. "
            f"Received: {', '.join(map(str, x))}"
        )
    columns = {key: _to_list(x[key]) for key in x if key in TEXT_KEYS or is_column(x[key])}
    if len({len(column) for column in columns.values()}) > 1:
        counts = ", ".join(f"{len(column)} {key}" for key, column in columns.items())
        raise InputError(f"encoder_text, decoder_text and languages must pair up. Received: {counts}")
    return Texts(**{**x, **columns})


def from_columns(x: pa.Table | pa.RecordBatch, settings: DataSettings) -> Texts:
    columns = settings.columns()
    if not set(columns) <= set(x.schema.names):
        raise InputError(
            f"the table must have the columns {', '.join(columns)} (text_column, summary_column, source_lang_column, "
            f"target_lang_column). Received: {', '.join(x.schema.names)}"
        )
    names = (*columns[:2], settings.source_lang_column, settings.target_lang_column)
    values: list[Any] = [None if name is None else x.column(name).to_pylist() for name in names]
    return Texts(*values)


def _read_parquet(path: str | os.PathLike[str], settings: DataSettings) -> Iterator[Texts]:
    location = Location.parse(path)
    files = location.list_files(".parquet") if location.is_dir() else [location]
    if not files:
        raise InputError(f"no Parquet file in {location.url}")
    for file in files:
        with file.open("rb") as handle:
            try:
                parquet = pq.ParquetFile(handle)
            except pa.ArrowInvalid as error:
                raise InputError(f"{file.url} must be a Parquet file: {error}") from error
            for batch in parquet.iter_batches(CHUNK_ROWS, columns=settings.columns()):
                yield from_columns(batch, settings)


def _chunked(texts: Texts) -> Iterator[Texts]:
    for start in range(0, len(texts.encoder_text), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        sides: tuple[Any, Any] = texts.source_lang, texts.target_lang
        source_lang, target_lang = (lang[rows] if is_column(lang) else lang for lang in sides)
        yield Texts(texts.encoder_text[rows], texts.decoder_text[rows], source_lang, target_lang)


def encode(chunks: Iterable[Texts], preprocessor: Seq2SeqLMPreprocessor, settings: DataSettings) -> Examples:
    sources, labels, starts, done = [], [], list[int](), 0
    for texts in chunks:
        routes = preprocessor.try_routes(len(texts.encoder_text), texts.source_lang, texts.target_lang)
        unknown = next((row for row, route in enumerate(routes) if route.error), None)
        if unknown is not None:
            raise LanguageError(f"training row {done + unknown}: {routes[unknown].error}")
        try:
            source_ids, _ = preprocessor.encode_sources(texts.encoder_text, settings.max_source_length, routes)
            label_ids = preprocessor.encode_targets(texts.decoder_text, settings.max_target_length, routes)
        except TokenizationError as error:
            raise InputError(f"training row {done + error.row}: {error}") from error
        sources.append(Ragged.from_rows(source_ids))
        labels.append(Ragged.from_rows(label_ids))
        starts += preprocessor.decoder_starts(routes)
        done += len(texts.encoder_text)
    ragged = Ragged.concatenate(sources), Ragged.concatenate(labels)
    pad = preprocessor.tokenizer.pad_token_id
    return Examples(*ragged, np.array(starts, np.int32), pad, fixed_widths(preprocessor, settings))


def fixed_widths(preprocessor: Seq2SeqLMPreprocessor, settings: DataSettings) -> tuple[int, int] | None:
    if preprocessor.padding != "max_length":
        return None
    if settings.batch_tokens is not None:
        raise SettingsError('batch_tokens needs a preprocessor with padding="longest". Received: "max_length"')
    source = settings.max_source_length or preprocessor.encoder_sequence_length
    return source, settings.max_target_length or preprocessor.decoder_sequence_length


def required(preprocessor: Seq2SeqLMPreprocessor | None) -> Seq2SeqLMPreprocessor:
    if preprocessor is None:
        raise InputError("text needs a preprocessor: give the task one, or pass preprocessed (x, y, sample_weight)")
    return preprocessor


def _split_at(rows: int, fraction: float) -> int:
    if not 0 < fraction < 1:
        raise SettingsError(f"validation_split must be above 0 and below 1. Received: {fraction!r}")
    cut = int(rows * (1 - fraction))
    if not 0 < cut < rows:
        raise SettingsError(f"validation_split={fraction} of {rows} rows leaves one side empty")
    return cut


def _to_list(values: Any) -> Sequence[Any]:
    if isinstance(values, (str, bytes)):
        return [values]
    for method in ("to_pylist", "tolist"):
        if hasattr(values, method):
            return getattr(values, method)()
    return values if isinstance(values, (list, tuple)) else list(values)


def _to_array(values: Any) -> Any:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)
