"""Finding the input files and judging them by their footers, before any model loads."""

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.errors import InfrastructureError, InputError
from s2s_ray.pipelines.retries import retrying
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location

THREADS = 32
NEW_COLUMNS = {
    "num_tokens": pa.int32(),
    "finish_reason": pa.string(),
    "truncated": pa.bool_(),
    "score": pa.float32(),
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as listed: its URL, and size with etag or modification time."""

    url: str
    identity: str


@dataclass(frozen=True, slots=True)
class Footer:
    """What planning needs of one file: the rows of each row group, and the schema."""

    file: InputFile
    row_groups: tuple[int, ...]
    schema: pa.Schema


class Watched(io.RawIOBase):
    """A stream that remembers a failed read, which tells failing storage apart from corrupt content."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except Exception as error:
            self.error = error
            raise

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def find_files(inputs: Sequence[str], output: Location) -> list[InputFile]:
    """The files that `inputs` name: in the order given, sorted within a folder or glob. Raises InputError."""
    listed: list[tuple[Location, str | None]] = []
    for text in inputs:
        found = _expand(Location.parse(text))
        if not found:
            raise InputError(f"--input must name Parquet files. Nothing was found at {text}")
        listed += found
    urls = [location.url for location, _ in listed]
    if len(set(urls)) != len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise InputError(f"--input must name each file once. Named twice: {twice}")
    inside = [url for url in urls if url.startswith(f"{output.url.rstrip('/')}/")]
    if inside:
        raise InputError(f"--output must not hold the input. Received: {output.url}, input {inside[0]}")
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_stat, listed))


def read_footers(files: Sequence[InputFile], skip_bad: bool) -> tuple[list[Footer], dict[str, str]]:
    """(footers in order, reason by URL of the files left out). Raises InputError for a bad one unless `skip_bad`."""
    footers: list[Footer] = []
    skipped: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for file, footer in zip(files, pool.map(_read_footer, files), strict=True):
            if isinstance(footer, Footer):
                if footers and footer.schema.equals(footers[-1].schema, check_metadata=True):
                    footer = replace(footer, schema=footers[-1].schema)  # one object in place of 100,000 equal ones
                footers.append(footer)
            else:
                skipped[file.url] = footer
    if skipped and not skip_bad:
        url, reason = next(iter(skipped.items()))
        raise InputError(
            f"every input file must be readable Parquet. {len(skipped)} of {len(files)} are not, the first {url}: "
            f"{reason}. Mend or remove them, or leave them out with --skip-bad-files"
        )
    if not footers:
        raise InputError(f"--input must name readable Parquet files. All {len(files)} have an unreadable footer")
    return footers, skipped


def output_schema(footers: Sequence[Footer], settings: GenerateSettings) -> pa.Schema:
    """The schema of the output: the kept input columns, then the new ones.

    Raises InputError for a missing or wrongly typed text column, extension types, files whose schemas differ, and new
    columns whose names clash with kept ones.
    """
    first = footers[0]
    kept = list(first.schema.names if settings.columns is None else settings.columns)
    for footer in footers:
        _check_columns(footer, kept, settings)
        _check_same(footer, first, kept)
    new = new_columns(settings)
    if len({field.name for field in new}) != len(new):
        raise InputError(f"--summary-column must differ from the other new columns. Received: {new[0].name!r}")
    clashes = [field.name for field in new if field.name in kept]
    if clashes:
        raise InputError(
            f"new columns must not clash with input columns. Both have {', '.join(map(repr, clashes))}: choose another "
            "--summary-column, or leave the input's out with --columns"
        )
    return pa.schema([*(first.schema.field(name).remove_metadata() for name in kept), *new])


def new_columns(settings: GenerateSettings) -> list[pa.Field]:
    """The columns that a job adds, in order."""
    names = [name for name in NEW_COLUMNS if name != "score" or settings.score]
    return [pa.field(settings.summary_column, pa.string()), *(pa.field(name, NEW_COLUMNS[name]) for name in names)]


def _expand(location: Location) -> list[tuple[Location, str | None]]:
    if retrying(location.is_dir):
        return retrying(lambda: location.list_identities(".parquet"))
    if retrying(location.exists):
        return [(location, None)]
    if not any(char in location.path for char in "*?["):
        return []
    matches = retrying(location.glob)
    return [file for m in matches for file in (m.list_identities(".parquet") if m.is_dir() else [(m, None)])]


def _stat(listed: tuple[Location, str | None]) -> InputFile:
    location, identity = listed
    return InputFile(location.url, identity or retrying(location.identity))


def _read_footer(file: InputFile) -> Footer | str:
    """The footer, or why there is none. Raises InfrastructureError if storage fails, which says nothing of the file."""
    try:
        stream = retrying(Location.parse(file.url).open)
    except OSError as error:
        raise InfrastructureError(f"{file.url} cannot be opened: {error}") from error
    with stream:
        watched = Watched(stream)
        try:
            with pq.ParquetFile(watched) as parquet:
                metadata = parquet.metadata
                rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
                if any(n < 0 for n in rows) or sum(rows) != metadata.num_rows:
                    return f"row counts do not add up ({sum(rows)} in row groups, {metadata.num_rows} in the file)"
                return Footer(file, rows, parquet.schema_arrow)
        except (pa.ArrowException, OSError, ValueError) as error:
            if watched.error is not None:
                raise InfrastructureError(f"reading {file.url} failed: {watched.error}") from watched.error
            return " ".join(str(error).split())[:200]


def _check_columns(footer: Footer, kept: Iterable[str], settings: GenerateSettings) -> None:
    names, where = footer.schema.names, footer.file.url
    flags = {
        settings.text_column: "--text-column",
        settings.source_lang_column: "--source-lang-column",
        settings.target_lang_column: "--target-lang-column",
    }
    for name in dict.fromkeys([settings.text_column, *settings.language_columns(), *kept]):
        if name not in names:
            flag = flags.get(name, "--columns")
            raise InputError(f"{flag} must name a column of {where}. Received: {name!r}; it has {', '.join(names)}")
        if names.count(name) > 1:
            raise InputError(f"column names must be unique. {where} has {name!r} {names.count(name)} times")
    for name in (settings.text_column, *settings.language_columns()):
        kind = footer.schema.field(name).type
        if not is_text(kind):
            column = "the text column" if name == settings.text_column else flags[name]
            raise InputError(
                f"{column} must be string, or binary holding UTF-8. Received: {name!r} of type {kind} in {where}"
            )
    for field in footer.schema:
        if _has_extension(field):
            raise InputError(
                f"extension types are refused, because reading one may run code. {where} has one in column "
                f"{field.name!r}: rewrite the file with its storage type"
            )


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this Arrow type can hold the source text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in checks)


def _check_same(footer: Footer, first: Footer, kept: Sequence[str]) -> None:
    for name in kept:
        ours, theirs = footer.schema.field(name).type, first.schema.field(name).type
        if ours != theirs:
            raise InputError(
                f"all input files must agree on the kept columns. {name!r} is {ours} in {footer.file.url} and {theirs} "
                f"in {first.file.url}"
            )
    if kept == first.schema.names and len(footer.schema.names) != len(kept):
        more = next(name for name in footer.schema.names if name not in kept)
        raise InputError(
            f"all input files must agree on the kept columns. {footer.file.url} also has {more!r}, which "
            f"{first.file.url} lacks: name the columns to keep with --columns"
        )


def _has_extension(field: pa.Field) -> bool:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(kind):
        return _has_extension(pa.field("", kind.value_type))
    return any(_has_extension(kind.field(i)) for i in range(kind.num_fields))
