"""The unit ledger: which unit's output counts. No torch, no Ray.

Under OUT/_s2s: `claim.json` (whose output this is), and per fingerprint `plan.parquet`, `data/` and `errors/` (shards
under names no other attempt uses), `commit/` (one record per unit) and `attempts/` (attempts.py). A shard counts if and
only if its unit's commit record names it. Records are created exclusively, so retries, zombies and a second driver are
all safe: one of them wins and the others' shards are never referenced.
"""

import contextlib
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from s2s_ray.errors import FingerprintError, InfrastructureError, InputError
from s2s_ray.failpoints import failpoint
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.plan import Plan
from s2s_ray.pipelines.retries import create, retrying
from s2s_ray.storage import Location, canonical_json, sha256_bytes, strict_json

WORK, MANIFEST = "_s2s", "_manifest.json"
THREADS = 32


@dataclass(frozen=True, slots=True)
class Shard:
    """What one attempt at a unit produced: Parquet bytes of the good rows and of the error rows, with their counts."""

    data: bytes
    rows: int
    errors: bytes | None
    error_rows: int
    num_tokens: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file by name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The record that makes one attempt at a unit the unit's output."""

    unit: int
    attempt: str
    rows: int
    error_rows: int
    num_tokens: int
    reasons: Mapping[str, int]
    data: StoredFile
    errors: StoredFile | None

    def encode(self) -> bytes:
        return canonical_json(asdict(self))

    @classmethod
    def decode(cls, content: bytes, what: str) -> "Commit":
        values = strict_json(content, what, InfrastructureError)
        errors = values.pop("errors")
        return cls(**values | {"data": StoredFile(**values["data"])}, errors=StoredFile(**errors) if errors else None)


class Ledger:
    """The ledger of one run (one fingerprint) in one output directory."""

    def __init__(self, output: Location, fingerprint: str) -> None:
        self.output = output
        self.fingerprint = fingerprint
        self.work = output / WORK
        self.root = self.work / fingerprint
        self.data = self.root / "data"
        self.errors = self.root / "errors"
        self.records = self.root / "commit"
        self.attempts = self.root / "attempts"
        self.plan_file = self.root / "plan.parquet"

    def claim(self, document: Mapping[str, Any]) -> None:
        """Make the output this run's, or see that it is. Raises FingerprintError naming the fields that differ."""
        content = canonical_json({"fingerprint": self.fingerprint, "document": document})
        path = self.work / "claim.json"
        if not create(path, content, content.__eq__):
            check_claim(self.output, document)

    def store_plan(self, plan: Plan) -> Plan:
        """Store the plan unless one is stored; returns the stored one, from which all unit ids come."""
        content = planning.encode(plan)
        if create(self.plan_file, content, content.__eq__):
            return plan
        return self.stored_plan() or plan

    def stored_plan(self) -> Plan | None:
        """The plan of this run, if a driver got as far as storing it."""
        try:
            return planning.decode(retrying(self.plan_file.read_bytes))
        except FileNotFoundError:
            return None

    def committed(self) -> set[int]:
        """Ids of all committed units; one listing."""
        names = retrying(self.records.list_names)
        return {int(name[1:9]) for name in names if name.startswith("u") and name.endswith(".json")}

    def commit(self, unit: int, planned_rows: int, shard: Shard) -> Commit:
        """Write the shard and commit it; returns the unit's record, which is another attempt's if that came first.

        Raises InfrastructureError if the counts do not add up or storage keeps failing.
        """
        if shard.rows + shard.error_rows != planned_rows:
            raise InfrastructureError(
                f"unit {unit} must have {planned_rows} rows. Received: {shard.rows}, and {shard.error_rows} in error"
            )
        attempt = uuid.uuid4().hex
        try:
            data = self._write(self.data, unit, attempt, shard.data)
            errors = self._write(self.errors, unit, attempt, shard.errors) if shard.errors is not None else None
        except FileNotFoundError:
            return self.read(unit)  # another driver has published and removed the directory
        failpoint("commit.before")
        record = Commit(
            unit, attempt, shard.rows, shard.error_rows, shard.num_tokens, dict(shard.reasons), data, errors
        )
        path = self._record(unit)
        if create(path, record.encode(), lambda found: self._decode(found, path).attempt == attempt):
            failpoint("commit.after")
            return record
        winner = self.read(unit)
        self._discard(record)
        return winner

    def read(self, unit: int) -> Commit:
        """The commit record of one unit. Raises FileNotFoundError when it has none."""
        path = self._record(unit)
        record = self._decode(retrying(path.read_bytes), path)
        if record.unit != unit:
            raise InfrastructureError(f"{path.url} must be of unit {unit}. Received: {record.unit}")
        return record

    def commits(self) -> list[Commit]:
        """All records, by unit."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.read, sorted(self.committed())))

    def _record(self, unit: int) -> Location:
        return self.records / f"u{unit:08d}.json"

    def _decode(self, content: bytes, path: Location) -> Commit:
        return Commit.decode(content, path.url)

    def _write(self, directory: Location, unit: int, attempt: str, content: bytes) -> StoredFile:
        name = f"u{unit:08d}-{attempt}.parquet"
        retrying(lambda: (directory / name).write_atomic(content))
        return StoredFile(name, len(content), sha256_bytes(content))

    def _discard(self, record: Commit) -> None:
        with contextlib.suppress(OSError):  # what is left behind is referenced by nothing
            (self.data / record.data.name).delete()
            if record.errors:
                (self.errors / record.errors.name).delete()


def read_claim(output: Location) -> dict[str, Any] | None:
    """At least "fingerprint" and "document" of the run that owns `output`; None if none does.

    Raises InputError if there are files that no run of ours wrote.
    """
    for path in (output / WORK / "claim.json", output / MANIFEST):
        try:
            content: dict[str, Any] = strict_json(retrying(path.read_bytes), path.url)
            return content
        except FileNotFoundError:
            continue
    foreign = [name for name in output.list_names() if not name.startswith(".") and name != WORK]
    if foreign:
        raise InputError(f"--output must be new, empty, or an earlier run's. {output.url} holds {foreign[0]}")
    return None


def check_claim(output: Location, document: Mapping[str, Any]) -> bool:
    """True if `output` is owned by a run with these settings, False if by none; FingerprintError if by another."""
    claim = read_claim(output)
    if claim is None:
        return False
    planning.check_same(claim["document"], document, output)
    if claim["fingerprint"] != planning.fingerprint(document):
        raise FingerprintError(f"{output.url}/{WORK}/claim.json must match its own fingerprint: it was altered")
    return True
