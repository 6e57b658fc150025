"""Removing what a finished output's manifest does not refer to. No torch, no Ray."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from s2s_ray.errors import VerificationError
from s2s_ray.pipelines.lease import Lease
from s2s_ray.pipelines.ledger import WORK, Ledger
from s2s_ray.pipelines.publish import ERRORS, finished, read_manifest
from s2s_ray.pipelines.retries import retrying
from s2s_ray.storage import Location


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or directory below `_s2s`, or a temporary file of a killed process; its path is relative to the output."""

    path: str
    is_directory: bool = False


def clean(output: Location, dry_run: bool = False) -> list[Leftover]:
    """Remove shards that no record names, notes of attempts, other runs' work and temporary files; returns them.

    Only of a finished output: there every unit has its record, so nobody can commit a shard any more. What verification
    needs (plan, commit records) stays, and so does every file that no run of ours writes. Raises VerificationError if
    the output is not finished, OwnedElsewhereError while a job is at work on it.
    """
    manifest = read_manifest(output)
    ledger = Ledger(output, manifest["fingerprint"])
    if finished(ledger) is None:
        raise VerificationError(f"{output.url} must be finished to be cleaned: it has no _SUCCESS. Run its job again")
    shards = {entry["path"] for part in manifest["parts"] for entry in (part["data"], part["errors"]) if entry}
    with Lease(ledger.work):
        found = list(_leftovers(ledger, shards))
        for leftover in found if not dry_run else []:
            retrying(partial((output / leftover.path).delete, recursive=leftover.is_directory))
    return found


def _leftovers(ledger: Ledger, referenced: set[str]) -> Iterator[Leftover]:
    output, run = ledger.output, f"{WORK}/{ledger.fingerprint}"
    for name in retrying(ledger.work.list_names):
        if name not in ("claim.json", "owner.json", ledger.fingerprint):
            yield Leftover(f"{WORK}/{name}", is_directory=not _is_temporary(name))
    if retrying(ledger.attempts.list_names):
        yield Leftover(f"{run}/attempts", is_directory=True)
    for directory in ("data", "errors"):
        for name in retrying((ledger.root / directory).list_names):
            if f"{run}/{directory}/{name}" not in referenced:
                yield Leftover(f"{run}/{directory}/{name}")
    for directory in ("", f"{ERRORS}/", f"{run}/", f"{run}/commit/"):
        for name in retrying((output / directory if directory else output).list_names):
            if _is_temporary(name):
                yield Leftover(f"{directory}{name}")


def _is_temporary(name: str) -> bool:
    """Names of `Location.write_atomic` and `create_exclusive` on a local disk."""
    return name.startswith(".") and name.endswith(".tmp")
