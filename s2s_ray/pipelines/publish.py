"""From committed units to a finished output: the manifest, the published files, `_SUCCESS`, and their verification.

Order: parts and error parts, then `_manifest.json`, then `_SUCCESS`. Whoever reads through the manifest sees nothing or
everything. Every step can be repeated, so a crash at any point is cured by running it again.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.errors import InfrastructureError, S2SRayError, VerificationError
from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.ledger import MANIFEST, THREADS, WORK, Commit, Ledger, StoredFile
from s2s_ray.pipelines.plan import Plan
from s2s_ray.pipelines.retries import retrying
from s2s_ray.storage import Location, canonical_json, sha256_bytes, sha256_file, strict_json

SUCCESS, ERRORS = "_SUCCESS", "_errors"
SHOWN_PROBLEMS = 20


def finished(ledger: Ledger) -> dict[str, Any] | None:
    """The manifest of an output that is complete and this run's, else None."""
    if not retrying((ledger.output / SUCCESS).exists):
        return None
    manifest = read_manifest(ledger.output)
    return manifest if manifest["fingerprint"] == ledger.fingerprint else None


def read_manifest(output: Location) -> dict[str, Any]:
    """The manifest of an output. Raises VerificationError where there is none."""
    path = output / MANIFEST
    try:
        manifest: dict[str, Any] = strict_json(retrying(path.read_bytes), path.url, VerificationError)
    except FileNotFoundError:
        raise VerificationError(f"{output.url} must hold {MANIFEST}: there is none, the run is not finished") from None
    return manifest


def publish(ledger: Ledger, manifest: Mapping[str, Any]) -> None:
    """Publish what the manifest lists: shards to their final names, then the manifest, then `_SUCCESS`."""
    mode = manifest["publish"]
    if mode != "none":
        _copy_all(ledger, manifest, link=mode == "rename")
    retrying(lambda: (ledger.output / MANIFEST).write_atomic(canonical_json(manifest)))
    success = {"fingerprint": ledger.fingerprint, "rows": manifest["rows"], "finished_at": int(time.time())}
    retrying(lambda: (ledger.output / SUCCESS).write_atomic(canonical_json(success)))
    if mode != "none":
        remove_shards(ledger)


def publish_mode(output: Location, wanted: str) -> str:
    """rename (links) where the disk is local, else copy (server-side on an object store); none stays none."""
    if wanted == "auto" or (wanted == "rename" and not output.is_local):
        return "rename" if output.is_local else "copy"
    return wanted


def remove_shards(ledger: Ledger) -> None:
    """Remove the shards of a published run, orphans of killed attempts among them."""
    for directory in (ledger.data, ledger.errors):
        with contextlib.suppress(OSError):  # another driver removes or writes there too; what is left is unreferenced
            directory.delete(recursive=True)


def build_manifest(ledger: Ledger, plan: Plan, document: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """What the output consists of; a function of plan and commit records, so every driver builds the same one.

    mode: see `publish_mode`; with "none" the manifest names the shards where they are. Raises InfrastructureError if a
    unit is not committed or counts do not add up.
    """
    commits = ledger.commits()
    if [commit.unit for commit in commits] != [unit.id for unit in plan.units]:
        raise InfrastructureError(
            f"all {len(plan.units)} units must be committed before publishing. Received: {len(commits)}"
        )
    parts = []
    for unit, commit in zip(plan.units, commits, strict=True):
        if commit.rows + commit.error_rows != unit.rows:
            raise InfrastructureError(f"unit {unit.id} must have {unit.rows} rows. Received: {commit}")
        parts.append(_part(unit.first_row, commit, ledger, in_place=mode == "none"))
    reasons: Counter[str] = Counter()
    for commit in commits:
        reasons.update(commit.reasons)
    return {
        "format": planning.FORMAT_VERSION,
        "fingerprint": ledger.fingerprint,
        "document": dict(document),
        "publish": mode,
        "plan_sha256": sha256_bytes(retrying(ledger.plan_file.read_bytes)),
        "columns": [{"name": field.name, "type": str(field.type)} for field in plan.schema],
        "rows": sum(commit.rows for commit in commits),
        "error_rows": sum(commit.error_rows for commit in commits),
        "num_tokens": sum(commit.num_tokens for commit in commits),
        "reasons": dict(reasons),
        "skipped_files": dict(plan.skipped),
        "parts": parts,
    }


def verify(output: Location) -> dict[str, Any]:
    """Re-read an output and prove it against its manifest; returns the manifest.

    Checked: fingerprint, plan, order, counts, and size, SHA-256 and rows of every file; no file more and none less.
    Raises VerificationError that lists what does not match.
    """
    manifest = read_manifest(output)
    problems: list[str] = []
    try:
        problems += _check_head(output, manifest)
        expected = [(part, kind) for part in manifest["parts"] for kind in ("data", "errors") if part[kind]]
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda item: _check_file(output, item[0], item[1]), expected)
        problems += [problem for problem in found if problem]
        problems += _check_strays(output, {part[kind]["path"] for part, kind in expected})
    except (KeyError, TypeError) as error:
        raise VerificationError(f"{(output / MANIFEST).url} must have the form of a manifest: {error!r}") from error
    if problems:
        more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise VerificationError(f"{output.url} does not verify: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}")
    return manifest


def _part(first_row: int, commit: Commit, ledger: Ledger, in_place: bool) -> dict[str, Any]:
    def entry(stored: StoredFile | None, kind: str, directory: str) -> dict[str, Any] | None:
        if stored is None:
            return None
        shard = f"{WORK}/{ledger.fingerprint}/{kind}/{stored.name}"
        path = shard if in_place else f"{directory}part-{commit.unit:08d}.parquet"
        return {"path": path, "shard": shard, "size": stored.size, "sha256": stored.sha256}

    return {
        "unit": commit.unit,
        "first_row": first_row,
        "rows": commit.rows,
        "error_rows": commit.error_rows,
        "data": entry(commit.data, "data", ""),
        "errors": entry(commit.errors, "errors", f"{ERRORS}/"),
    }


def _copy_all(ledger: Ledger, manifest: Mapping[str, Any], link: bool) -> None:
    def one(entry: Mapping[str, str]) -> None:
        shard, target = ledger.output / entry["shard"], ledger.output / entry["path"]
        try:
            retrying(lambda: shard.link_to(target) if link else shard.copy_to(target))
        except FileNotFoundError:
            # Another driver of this same run may have published it, and removed the shards since.
            if not retrying(target.exists) or retrying(lambda: sha256_file(target)) != entry["sha256"]:
                raise

    entries = [part[kind] for part in manifest["parts"] for kind in ("data", "errors") if part[kind]]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, entries))


def _check_head(output: Location, manifest: Mapping[str, Any]) -> list[str]:
    """Fingerprint, plan, order and sums."""
    problems = []
    document, parts = manifest["document"], manifest["parts"]
    if planning.fingerprint(document) != manifest["fingerprint"]:
        problems.append(f"{MANIFEST}: its settings do not hash to its fingerprint")
    if [part["unit"] for part in parts] != list(range(len(parts))):
        problems.append(f"{MANIFEST}: parts are not the units in order")
    first_row = 0
    for part in parts:
        if part["first_row"] != first_row:
            problems.append(f"{MANIFEST}: unit {part['unit']} starts at row {part['first_row']}, not {first_row}")
        first_row = part["first_row"] + part["rows"] + part["error_rows"]
    for name in ("rows", "error_rows"):
        total = sum(part[name] for part in parts)
        if total != manifest[name]:
            problems.append(f"{MANIFEST}: {name} is {manifest[name]}, its parts have {total}")
    if not (output / SUCCESS).exists():
        problems.append(f"{SUCCESS} is missing")
    return problems + _check_work(output, manifest)


def _check_work(output: Location, manifest: Mapping[str, Any]) -> list[str]:
    """The manifest against plan and commit records, where `_s2s` was kept."""
    ledger = Ledger(output, manifest["fingerprint"])
    if not ledger.plan_file.exists():
        return []
    content = retrying(ledger.plan_file.read_bytes)
    if sha256_bytes(content) != manifest["plan_sha256"]:
        return [f"{ledger.plan_file.url}: sha256 is not the manifest's"]
    try:
        rebuilt = build_manifest(ledger, planning.decode(content), manifest["document"], manifest["publish"])
    except S2SRayError as error:
        return [str(error)]
    if list(map(_facts, rebuilt["parts"])) != list(map(_facts, manifest["parts"])):
        return [f"{MANIFEST}: its parts are not what the commit records in {WORK} say"]
    return []


def _facts(part: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must agree between a part of the manifest and the commit record of its unit."""
    digests = [part[kind] and part[kind]["sha256"] for kind in ("data", "errors")]
    return part["unit"], part["first_row"], part["rows"], part["error_rows"], *digests


def _check_file(output: Location, part: Mapping[str, Any], kind: str) -> str | None:
    entry, rows = part[kind], part["rows" if kind == "data" else "error_rows"]
    path = output / entry["path"]
    try:
        size = path.size()
        if size != entry["size"]:
            return f"{entry['path']}: {size} bytes, the manifest says {entry['size']}"
        if sha256_file(path) != entry["sha256"]:
            return f"{entry['path']}: sha256 is not the manifest's"
        with path.open() as stream:
            found = pq.read_metadata(stream).num_rows
    except FileNotFoundError:
        return f"{entry['path']}: missing"
    except (OSError, pa.ArrowException) as error:
        return f"{entry['path']}: unreadable ({error})"
    return None if found == rows else f"{entry['path']}: {found} rows, the manifest says {rows}"


def _check_strays(output: Location, expected: set[str]) -> Sequence[str]:
    found = {name for name in output.list_names() if name.endswith(".parquet")}
    found |= {f"{ERRORS}/{name}" for name in (output / ERRORS).list_names() if name.endswith(".parquet")}
    return [f"{path}: not in the manifest" for path in sorted(found - expected)]
