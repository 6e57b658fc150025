"""Pairs of texts to token ids, once per run: Parquet in, files of ids out that every worker maps into memory.

    OUT/_s2s/<fingerprint>/tokens/<train or validation>-u00000000.arrow ...    ids, one file a unit
                                  <train or validation>.json                   what there is; last

No torch when imported: this runs in CPU tasks.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import pyarrow as pa

from s2s_ray import presets
from s2s_ray.errors import ErrorRateExceededError, InputError, RowErrorReason
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.cluster import TASK_CPUS, execute
from s2s_ray.pipelines.finetune_settings import FinetuneSettings
from s2s_ray.pipelines.inputs import Footer, InputFile, is_text, read_footers
from s2s_ray.pipelines.plan import Unit
from s2s_ray.pipelines.rows import read_piece, text_bytes
from s2s_ray.storage import Location, canonical_json, strict_json
from s2s_ray.text.languages import Route
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor

# What training/shards.py reads.
_SCHEMA = pa.schema([("source", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("start", pa.int32())])
EMPTY = "EMPTY"  # a source or target without text teaches nothing


@dataclass(frozen=True)
class TokenJob:
    """What tokenising a unit needs to know; small, and sent to every task."""

    settings: FinetuneSettings
    preset_digest: str
    directory: Location

    def preprocessor(self) -> Seq2SeqLMPreprocessor:
        """Of the job's preset, from this node's cache; loaded once per process."""
        return _preprocessor(self.settings, self.preset_digest)


def cut_inputs(
    inputs: Sequence[Sequence[InputFile]], settings: FinetuneSettings, what: str
) -> tuple[list[Unit], list[int]]:
    """(units, the number of units of each input). Raises InputError for unreadable files and missing columns."""
    units: list[Unit] = []
    counts = []
    for files in inputs:
        footers, _ = read_footers(files, skip_bad=False)
        for footer in footers:
            _check_columns(footer, settings, what)
        own = planning.cut(footers, None)
        units += [dataclasses.replace(unit, id=len(units) + unit.id) for unit in own]
        counts.append(len(own))
    return units, counts


def tokenise(name: str, units: Sequence[Unit], counts: Sequence[int], job: TokenJob) -> dict[str, Any]:
    """Tokenise what is not tokenised yet, on the cluster. Returns the index: `files`, `inputs` (pairs of each input),
    `skipped` by reason, `truncated` sources and targets.

    Raises ErrorRateExceededError when more pairs than `max_error_rate` are unusable.
    """
    import ray

    index_file = job.directory / f"{name}.json"
    try:
        index: dict[str, Any] = strict_json(index_file.read_bytes(), index_file.url)
        return index
    except FileNotFoundError:
        pass
    items = [{"unit": unit.id, "descriptor": unit.encode()} for unit in units]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(tokenise_unit, name=name, job=job), num_cpus=TASK_CPUS
    )
    done = {row["unit"]: strict_json(row["result"], "a unit's result") for row in execute(dataset)}
    results = [done[unit.id] for unit in units]
    edges = [sum(counts[:i]) for i in range(len(counts) + 1)]
    skipped: Counter[str] = Counter()
    for result in results:
        skipped.update(result["skipped"])
    index = {
        "files": [_file_name(name, unit.id) for unit in units],
        "inputs": [sum(r["pairs"] for r in results[a:b]) for a, b in pairwise(edges)],
        "skipped": dict(skipped),
        "truncated": [sum(r["truncated"][side] for r in results) for side in (0, 1)],
        "tokens": [sum(r["tokens"][side] for r in results) for side in (0, 1)],
    }
    _check_rate(name, index, job.settings)
    index_file.write_atomic(canonical_json(index))
    return index


def tokenise_unit(row: dict[str, Any], name: str, job: TokenJob) -> dict[str, Any]:
    """A unit's descriptor to its file of ids; a rerun writes the same bytes. Runs as a CPU task."""
    unit = Unit.decode(row["descriptor"])
    settings = job.settings
    preprocessor = job.preprocessor()
    columns: tuple[list[list[int]], list[list[int]], list[int]] = ([], [], [])
    skipped: Counter[str] = Counter()
    truncated = [0, 0]
    for pairs in read_pairs(unit, settings):
        routes = routes_of(pairs, preprocessor)
        encoded = preprocessor.try_encode_sources(pairs.sources, settings.max_source_length, routes)
        checked = preprocessor.try_encode_sources(pairs.targets, settings.max_target_length, routes)
        reasons = [_reason(*row) for row in zip(encoded, checked, pairs.sources, pairs.targets, strict=True)]
        skipped.update(reason for reason in reasons if reason is not None)
        good = [i for i, reason in enumerate(reasons) if reason is None]
        routes = [routes[i] for i in good]
        targets: list[Any] = [pairs.targets[i] for i in good]
        before = preprocessor.truncated_targets
        columns[0].extend(encoded[i].token_ids for i in good)
        columns[1].extend(preprocessor.encode_targets(targets, settings.max_target_length, routes))
        columns[2].extend(preprocessor.decoder_starts(routes))
        truncated[0] += sum(encoded[i].truncated for i in good)
        truncated[1] += preprocessor.truncated_targets - before
    (job.directory / _file_name(name, unit.id)).write_atomic(_encode(*columns))
    tokens = [sum(map(len, side)) for side in columns[:2]]
    result = {"pairs": len(columns[0]), "skipped": dict(skipped), "truncated": truncated, "tokens": tokens}
    return {"unit": unit.id, "result": canonical_json(result)}


def routes_of(pairs: "Pairs", preprocessor: Seq2SeqLMPreprocessor) -> list[Route]:
    """Of each pair's languages; with an error where its language is unknown, or null and there is no default."""
    routes = preprocessor.try_routes(len(pairs.sources), pairs.source_lang, pairs.target_lang)
    sides = (pairs.source_lang, preprocessor.source_lang), (pairs.target_lang, preprocessor.target_lang)
    for column, default in sides:
        for row, language in enumerate(column or ()):
            if not language and default is None:
                routes[row] = Route(error="the language is null or empty")
    return routes


@lru_cache(maxsize=2)
def _preprocessor(settings: FinetuneSettings, digest: str) -> Seq2SeqLMPreprocessor:
    return Seq2SeqLMPreprocessor.from_directory(
        presets.resolve(settings.preset, expected_digest=digest).directory,
        source_prefix=settings.source_prefix,
        source_lang=settings.source_lang,
        target_lang=settings.target_lang,
    )


def _encode(sources: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], starts: Sequence[int]) -> bytes:
    """An uncompressed Arrow file, which is mapped into memory as it is."""
    arrays = [pa.array(c, f.type) for c, f in zip((sources, labels, starts), _SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
    return bytes(sink.getvalue())


@dataclass(frozen=True, slots=True)
class Pairs:
    """Texts as bytes, None for null; languages of each, or None without --source-lang-column, --target-lang-column."""

    sources: list[bytes | None]
    targets: list[bytes | None]
    source_lang: list[str | None] | None
    target_lang: list[str | None] | None


def read_pairs(unit: Unit, settings: FinetuneSettings) -> Iterator[Pairs]:
    """The pairs of each piece of a unit."""
    for piece in unit.pieces:
        try:
            table = read_piece(piece, settings.columns())
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise InputError(f"{piece.file.url}: row group {piece.row_group} cannot be read: {error}") from error
        languages = (settings.source_lang_column, settings.target_lang_column)
        source, target = (None if name is None else table.column(name).to_pylist() for name in languages)
        texts, targets = (text_bytes(table.column(name)) for name in settings.columns()[:2])
        yield Pairs(texts, targets, source, target)


def _reason(source: Any, target: Any, source_text: bytes | None, target_text: bytes | None) -> str | None:
    """Why a pair cannot be trained on."""
    error: RowErrorReason | None = source.error or target.error
    if error is not None:
        return error.value
    assert source_text is not None and target_text is not None
    return None if source_text.strip() and target_text.strip() else EMPTY


def _check_columns(footer: Footer, settings: FinetuneSettings, what: str) -> None:
    names = footer.schema.names
    for flag, name in (
        ("--text-column", settings.text_column),
        ("--summary-column", settings.summary_column),
        ("--source-lang-column", settings.source_lang_column),
        ("--target-lang-column", settings.target_lang_column),
    ):
        if name is None:
            continue
        if names.count(name) != 1 or not is_text(footer.schema.field(name).type):
            kind = footer.schema.field(name).type if names.count(name) == 1 else f"{names.count(name)} columns"
            raise InputError(
                f"{flag} must name one text column of every file of {what}. Received: {name!r}, which is {kind} in "
                f"{footer.file.url}; it has {', '.join(names)}"
            )


def _check_rate(name: str, index: dict[str, Any], settings: FinetuneSettings) -> None:
    bad, good = sum(index["skipped"].values()), sum(index["inputs"])
    if not good:
        raise InputError(f"the {name} data must hold a usable pair. Skipped: {index['skipped'] or 'none, it is empty'}")
    if bad > settings.max_error_rate * (bad + good):
        raise ErrorRateExceededError(
            f"at most {settings.max_error_rate:.2%} of the {name} pairs may be unusable (--max-error-rate). "
            f"Received: {bad} of {bad + good}: {index['skipped']}"
        )


def _file_name(name: str, unit: int) -> str:
    return f"{name}-u{unit:08d}.arrow"
