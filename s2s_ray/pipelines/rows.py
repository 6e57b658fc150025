"""What happens to the rows of a unit on CPUs: read and tokenised before the model, made into shards after it.

No torch, no Ray. Three Arrow tables travel from stage to stage: `work` (one line per planned row, or per sentence of
it, WORK_SCHEMA), `carried` (the kept input columns of the readable rows, exactly as read) and `answers`
(ANSWER_SCHEMA, aligned with `work`).
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from s2s_ray import presets
from s2s_ray.errors import InfrastructureError, InputError, RowErrorReason, S2SRayError
from s2s_ray.pipelines.inputs import Watched, new_columns
from s2s_ray.pipelines.ledger import Ledger, Shard
from s2s_ray.pipelines.plan import Piece, Unit
from s2s_ray.pipelines.retries import retrying
from s2s_ray.pipelines.segments import DONE_SCHEMA, Line, join, lines_of, numbered, row_starts
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location
from s2s_ray.text.languages import NO_ROUTE, Route
from s2s_ray.text.preprocessor import EncodedSource, Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import TokenizationError

MAX_MESSAGE_BYTES = 512
ROUTED = ("forced_bos_token_id", "decoder_start_token_id")  # generation settings that may follow a row's languages
WORK_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # position in the whole input; with the seed it decides what is sampled
        ("segment", pa.int32()),  # number of the line within its row
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("source_row", pa.int64()),
        ("before", pa.string()),  # the row's text between the line before and this one; null where rows are not cut
        ("after", pa.string()),  # and what follows its last line
        ("token_ids", pa.list_(pa.int32())),  # null where the model is not needed
        *((name, pa.int32()) for name in ROUTED),  # null where the preset's own
        ("truncated", pa.bool_()),
        ("reason", pa.string()),  # null while the row is good
        ("message", pa.string()),
        ("input_sha256", pa.string()),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("score", pa.float32()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
ERROR_SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("input_sha256", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Job:
    """What every stage needs to know; small, and sent to every worker."""

    settings: GenerateSettings
    preset_digest: str
    fingerprint: str
    schema: pa.Schema  # of the output
    run_id: str

    @property
    def ledger(self) -> Ledger:
        return Ledger(Location.parse(self.settings.output), self.fingerprint)

    @property
    def kept_columns(self) -> list[str]:
        return self.schema.names[: len(self.schema) - len(new_columns(self.settings))]

    def preprocessor(self) -> Seq2SeqLMPreprocessor:
        """Of the job's preset, from this node's cache; loaded once per process."""
        options = tuple(self.settings.preprocessing().items())
        return _preprocessor(self.settings.preset, self.preset_digest, options)


@lru_cache(maxsize=2)
def _preprocessor(preset: str, digest: str, options: tuple[tuple[str, Any], ...]) -> Seq2SeqLMPreprocessor:
    resolved = presets.resolve(preset, expected_digest=digest)
    return Seq2SeqLMPreprocessor.from_directory(resolved.directory, **dict(options))


def read_unit(unit: Unit, job: Job) -> tuple[pa.Table, pa.Table]:
    """(work, carried) of one unit. Rows of a row group that cannot be decoded are UNREADABLE and carry nothing."""
    work: list[pa.Table] = [WORK_SCHEMA.empty_table()]
    carried = [pa.schema([job.schema.field(name) for name in job.kept_columns]).empty_table()]
    columns = list(dict.fromkeys([*job.kept_columns, job.settings.text_column, *job.settings.language_columns()]))
    row = unit.first_row
    for piece in unit.pieces:
        try:
            table = read_piece(piece, columns)
        except S2SRayError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            bad = EncodedSource(error=RowErrorReason.UNREADABLE, message=brief(error))
            lines = [Line(index, None, source=bad) for index in range(piece.rows)]
            work.append(_work_table(piece, row, lines, [NO_ROUTE] * piece.rows, [None] * piece.rows))
        else:
            texts = text_bytes(table.column(job.settings.text_column))
            routes, languages = _routes(table, job)
            lines = lines_of(texts, routes, languages, job.preprocessor(), job.settings)
            work.append(_work_table(piece, row, lines, routes, texts))
            carried.append(table.select(job.kept_columns).cast(carried[0].schema))
        row += piece.rows
    return pa.concat_tables(work), pa.concat_tables(carried)


def make_shard(unit: Unit, work: pa.Table, carried: pa.Table, answers: pa.Table, attempts: int, job: Job) -> Shard:
    """The shard of one unit: good rows with the new columns in input order, and error rows."""
    reasons = pc.coalesce(work.column("reason"), answers.column("reason")).combine_chunks()
    messages = pc.coalesce(work.column("message"), answers.column("message")).combine_chunks()
    texts, reasons, messages = _decode(answers.column("token_ids").to_pylist(), reasons, messages, job)
    lengths = pc.fill_null(pc.list_value_length(answers.column("token_ids")), 0)
    shared = [answers.column("finish_reason"), work.column("truncated"), answers.column("score")]
    done = join(work, pa.table([pa.array(texts, pa.string()), lengths, *shared, reasons, messages], schema=DONE_SCHEMA))
    work = work.take(row_starts(work))
    good = done.column("reason").is_null()
    readable = pc.not_equal(pc.fill_null(work.column("reason"), ""), RowErrorReason.UNREADABLE.value)
    columns = [column.filter(good.filter(readable)) for column in carried.columns]
    for field in new_columns(job.settings):
        values = done.column("text" if field.name == job.settings.summary_column else field.name)
        columns.append(values.filter(good).cast(field.type))
    kept = pa.Table.from_arrays(columns, schema=job.schema)
    errors = _error_table(unit, work, done, attempts)
    return Shard(
        data=_parquet(kept),
        rows=kept.num_rows,
        # Unit 0 always has one, so that the errors dataset exists and can be read even when it is empty.
        errors=_parquet(errors) if errors.num_rows or unit.id == 0 else None,
        error_rows=errors.num_rows,
        num_tokens=pc.sum(done.column("num_tokens").filter(good)).as_py() or 0,
        reasons=Counter(errors.column("reason").to_pylist()),
    )


def to_ipc(table: pa.Table) -> bytes:
    """An Arrow IPC stream: every type survives, which a conversion to rows would not promise."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_ipc(content: bytes) -> pa.Table:
    """The inverse of `to_ipc`."""
    with pa.ipc.open_stream(pa.py_buffer(content)) as reader:
        return reader.read_all()


def read_piece(piece: Piece, columns: list[str]) -> pa.Table:
    """These columns of a piece's rows.

    Raises InputError for a file that changed, InfrastructureError where storage fails, pyarrow's errors and ValueError
    for content that cannot be decoded.
    """
    location = Location.parse(piece.file.url)
    try:
        # Nodes may hold copies of a local file with times of their own; there the size must do.
        identity = str(retrying(location.size)) if location.is_local else retrying(location.identity)
        planned = piece.file.identity.partition("-")[0] if location.is_local else piece.file.identity
        if identity != planned:
            raise InputError(f"{location.url} must not change during a run: it is another file than was planned")
        stream = retrying(location.open)
    except OSError as error:
        raise InfrastructureError(f"{location.url} cannot be opened any more: {error}") from error
    with stream:
        watched = Watched(stream)
        try:
            with pq.ParquetFile(watched, page_checksum_verification=True) as parquet:
                table = parquet.read_row_group(piece.row_group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError):
            if watched.error is not None:
                raise InfrastructureError(f"reading {location.url} failed: {watched.error}") from watched.error
            raise
    table = table.slice(piece.start, piece.rows).select(columns)
    if table.num_rows != piece.rows:
        raise ValueError(f"row group {piece.row_group} has fewer rows than the footer says")
    return table


def text_bytes(column: pa.ChunkedArray) -> list[bytes | None]:
    """The text as bytes: Arrow does not check UTF-8 when it reads a string column, so a row's bytes may be no text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return texts


def _routes(table: pa.Table, job: Job) -> tuple[list[Route], list[str]]:
    """The route of each row's languages, with an error for a row that names none; and the source languages."""
    preprocessor = job.preprocessor()
    columns: list[list[str] | str | None] = [None, None]
    for side, name in enumerate((job.settings.source_lang_column, job.settings.target_lang_column)):
        if name is not None:
            columns[side] = [(text or b"").decode(errors="replace").strip() for text in text_bytes(table.column(name))]
    routes = preprocessor.try_routes(table.num_rows, *columns)
    for name, column in zip(("source", "target"), columns, strict=True):
        for row in [row for row, language in enumerate(column or ()) if not language]:
            routes[row] = Route(error=f"the {name} language is null or empty")
    sources = columns[0] or [preprocessor.source_lang or "en"] * table.num_rows
    return routes, list(sources)


def _work_table(
    piece: Piece, first_row: int, lines: Sequence[Line], routes: Sequence[Route], texts: Sequence[bytes | None]
) -> pa.Table:
    digests = [None if text is None else hashlib.sha256(text).hexdigest() for text in texts]
    sources = [line.source for line in lines]
    columns = {
        "row": [first_row + line.row for line in lines],
        "segment": numbered(lines),
        "source": [piece.file.url] * len(lines),
        "source_row": [piece.file_row + line.row for line in lines],
        "before": [line.before for line in lines],
        "after": [line.after for line in lines],
        "token_ids": [source.token_ids if source.token_ids and source.error is None else None for source in sources],
        **{name: [routes[line.row].generation_changes().get(name) for line in lines] for name in ROUTED},
        "truncated": [source.truncated for source in sources],
        "reason": [source.error and source.error.value for source in sources],
        "message": [brief(source.message) if source.error else None for source in sources],
        "input_sha256": [digests[line.row] for line in lines],
    }
    return pa.table(columns, schema=WORK_SCHEMA)


def _decode(
    ids: Sequence[list[int] | None], reasons: pa.Array, messages: pa.Array, job: Job
) -> tuple[list[str], pa.Array, pa.Array]:
    """Texts per row ("" where there are no ids). A row whose ids cannot be decoded gets TOKENIZER_FAILED."""
    decode = job.preprocessor().decode
    sequences = [row or [] for row in ids]
    try:
        return decode(sequences), reasons, messages
    except TokenizationError:
        pass
    texts, reason_list, message_list = [""] * len(sequences), reasons.to_pylist(), messages.to_pylist()
    for index, sequence in enumerate(sequences):
        try:
            texts[index] = decode([sequence])[0]
        except TokenizationError as error:
            reason_list[index], message_list[index] = RowErrorReason.TOKENIZER_FAILED.value, brief(error)
    return texts, pa.array(reason_list, pa.string()), pa.array(message_list, pa.string())


def _error_table(unit: Unit, work: pa.Table, done: pa.Table, attempts: int) -> pa.Table:
    bad = done.column("reason").is_valid()
    rows = work.filter(bad)
    columns: dict[str, Any] = {
        "unit": pa.repeat(pa.scalar(unit.id, pa.int64()), rows.num_rows),
        "row": rows.column("row"),
        "source": rows.column("source").cast(pa.string()),
        "source_row": rows.column("source_row"),
        "reason": done.column("reason").filter(bad),
        "message": done.column("message").filter(bad),
        "input_sha256": rows.column("input_sha256"),
        "attempts": pa.repeat(pa.scalar(attempts, pa.int32()), rows.num_rows),
    }
    return pa.table(columns, schema=ERROR_SCHEMA)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def brief(message: object) -> str:
    """At most MAX_MESSAGE_BYTES of UTF-8 on one line."""
    text = " ".join(str(message).split())
    return text.encode(errors="replace")[:MAX_MESSAGE_BYTES].decode(errors="ignore")
