"""The plan: the input cut into units, once, and the fingerprint that says which run an output belongs to.

A unit is at most `rows_per_unit` rows: a slice of a large row group, or several small row groups and files packed
together. Units are numbered in input order; that order is the output's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.errors import FingerprintError
from s2s_ray.pipelines.inputs import Footer, InputFile
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location, canonical_json, sha256_bytes, strict_json

FORMAT_VERSION = 1
SMALLEST_UNIT, LARGEST_UNIT, WANTED_UNITS = 128, 10_000, 200
_PLAN_SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("url", pa.dictionary(pa.int32(), pa.string())),
        ("identity", pa.dictionary(pa.int32(), pa.string())),
        ("row_group", pa.int32()),
        ("start", pa.int64()),
        ("rows", pa.int64()),
        ("file_row", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` rows of one row group from `start` on; the first of them is row `file_row` of the file."""

    file: InputFile
    row_group: int
    start: int
    rows: int
    file_row: int


@dataclass(frozen=True, slots=True)
class Unit:
    """The atom of work and of commit. `first_row` is the position of its first row in the whole input."""

    id: int
    first_row: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    def encode(self) -> bytes:
        return canonical_json(asdict(self))

    @classmethod
    def decode(cls, content: bytes) -> "Unit":
        values = strict_json(content, "a unit")
        pieces = [Piece(**piece | {"file": InputFile(**piece["file"])}) for piece in values["pieces"]]
        return cls(values["id"], values["first_row"], tuple(pieces))


@dataclass(frozen=True, slots=True)
class Plan:
    """All units, the schema of the output, and the input files left out with the reason."""

    units: tuple[Unit, ...]
    schema: pa.Schema
    skipped: Mapping[str, str]

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)


def cut(footers: Sequence[Footer], rows_per_unit: int | None) -> tuple[Unit, ...]:
    """The units of these files, in input order; one without rows when the input has none."""
    total = sum(sum(footer.row_groups) for footer in footers)
    limit = rows_per_unit or min(LARGEST_UNIT, max(SMALLEST_UNIT, -(-total // WANTED_UNITS)))
    units: list[Unit] = []
    first_row = 0
    for pieces in _pack(_pieces(footers, limit), limit):
        units.append(Unit(len(units), first_row, pieces))
        first_row += units[-1].rows
    return tuple(units) or (Unit(0, 0, ()),)


def _pieces(footers: Iterable[Footer], limit: int) -> Iterator[Piece]:
    """Row groups, those above `limit` rows in slices of nearly equal size."""
    for footer in footers:
        file_row = 0
        for group, rows in enumerate(footer.row_groups):
            slices = -(-rows // limit)
            for index in range(slices):
                start, stop = rows * index // slices, rows * (index + 1) // slices
                yield Piece(footer.file, group, start, stop - start, file_row + start)
            file_row += rows


def _pack(pieces: Iterable[Piece], limit: int) -> Iterator[tuple[Piece, ...]]:
    packed: list[Piece] = []
    rows = 0
    for piece in pieces:
        if packed and rows + piece.rows > limit:
            yield tuple(packed)
            packed, rows = [], 0
        packed.append(piece)
        rows += piece.rows
    if packed:
        yield tuple(packed)


def encode(plan: Plan) -> bytes:
    """The plan as a Parquet file, one row per piece."""
    rows = [(unit.id, piece) for unit in plan.units for piece in unit.pieces]
    columns = {
        "unit": [unit for unit, _ in rows],
        "url": [piece.file.url for _, piece in rows],
        "identity": [piece.file.identity for _, piece in rows],
        **{n: [getattr(piece, n) for _, piece in rows] for n in ("row_group", "start", "rows", "file_row")},
    }
    table = pa.table(columns, schema=_PLAN_SCHEMA).replace_schema_metadata(
        {
            b"s2s_ray.schema": plan.schema.serialize().to_pybytes(),
            b"s2s_ray.skipped": canonical_json(dict(plan.skipped)),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def decode(data: bytes) -> Plan:
    """The inverse of `encode`."""
    table = pq.read_table(pa.BufferReader(data))
    schema = pa.ipc.read_schema(pa.py_buffer(table.schema.metadata[b"s2s_ray.schema"]))
    skipped = strict_json(table.schema.metadata[b"s2s_ray.skipped"], "the stored plan")
    by_unit: dict[int, list[Piece]] = {}
    for unit, url, identity, *place in zip(*(table.column(n).to_pylist() for n in _PLAN_SCHEMA.names), strict=True):
        by_unit.setdefault(unit, []).append(Piece(InputFile(url, identity), *place))
    units: list[Unit] = []
    first_row = 0
    for unit_id, pieces in sorted(by_unit.items()):
        units.append(Unit(unit_id, first_row, tuple(pieces)))
        first_row += units[-1].rows
    return Plan(tuple(units) or (Unit(0, 0, ()),), schema, skipped)


def document(settings: GenerateSettings, files: Sequence[InputFile], preset_digest: str) -> dict[str, Any]:
    """Everything that decides what the output's rows are; its canonical JSON is hashed into the fingerprint.

    Not in it: machines, replicas, tokens per batch, the allowed error rate, how the output is published.
    """
    content = {
        "format": FORMAT_VERSION,
        "input": [[file.url, file.identity] for file in files],
        "preset": preset_digest,
        **settings.identity(),
    }
    # As it reads back from a file, so that stored and new ones compare.
    result: dict[str, Any] = strict_json(canonical_json(content), "the settings")
    return result


def fingerprint(settings_document: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return sha256_bytes(canonical_json(settings_document))[:32]


def check_same(stored: Mapping[str, Any], ours: Mapping[str, Any], output: Location) -> None:
    """Raises FingerprintError that names each field in which `ours` differs from the run that owns `output`."""
    differing = [name for name in sorted({*stored, *ours}) if stored.get(name) != ours.get(name)]
    if differing:
        listed = "; ".join(_difference(name, stored.get(name), ours.get(name)) for name in differing)
        raise FingerprintError(
            f"{output.url} belongs to a run with other settings: {listed}. Use those settings to resume it, or another "
            "--output"
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if name == "input" and old and new:
        before, after = dict(old), dict(new)
        changed = sorted(url for url in {*before, *after} if before.get(url) != after.get(url))
        if not changed:
            return "the order of input"
        return f"input ({len(changed)} files added, removed or changed, the first {changed[0]})"
    shown = [text if len(text := repr(value)) <= 60 else f"{text[:60]}..." for value in (old, new)]
    return f"{name} was {shown[0]}, now {shown[1]}"


def describe(plan: Plan, files: Sequence[InputFile], digest: str) -> list[str]:
    """The plan in words, for --dry-run."""
    names = ", ".join(f"{field.name}: {field.type}" for field in plan.schema)
    lines = [
        f"{plan.rows} rows in {len(files) - len(plan.skipped)} files, {len(plan.units)} units of at most "
        f"{max(unit.rows for unit in plan.units)} rows",
        f"columns of the output: {names}",
        f"fingerprint {digest}",
    ]
    return lines + [f"left out: {url} ({reason})" for url, reason in plan.skipped.items()]
