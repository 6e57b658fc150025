"""Cleaning removes every leftover of killed attempts, and nothing that the manifest or verification needs."""

from pathlib import Path

import pytest
from checker import check
from job_helpers import write_input
from ledger_run import LedgerRun, exit_code, in_child, new_output

from s2s_ray.errors import OwnedElsewhereError, VerificationError
from s2s_ray.failpoints import FAILPOINT_EXIT_CODE
from s2s_ray.pipelines.attempts import Attempts
from s2s_ray.pipelines.clean import clean
from s2s_ray.pipelines.lease import Lease
from s2s_ray.pipelines.publish import verify
from s2s_ray.storage import Location


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_input(tmp_path_factory.mktemp("input"), [f"text {row}" for row in range(22)], files=2, group=5)


def names(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_leftovers_of_killed_attempts(inputs: list[str], tmp_path: Path, mode: str) -> None:
    clean_run = LedgerRun(inputs, new_output(tmp_path), mode=mode)
    clean_run.drive()
    assert not clean(clean_run.output)
    run = clean_run.to(new_output(tmp_path))
    # Killed with a shard written, and between a temporary file and its rename.
    for failpoint in ("commit.before:2:kill", "fsync.before:9:kill"):
        assert exit_code(in_child(run.drive, failpoint)) != 0
    assert Attempts(run.ledger, 3).start() == 1
    (run.ledger.work / "0123" / "plan.parquet").write_atomic(b"an older run's")
    run.drive()
    output = Path(run.settings.output)
    (output / "notes.txt").write_text("not ours")
    before = names(output)
    found = clean(run.output, dry_run=True)
    assert names(output) == before and {leftover.path.split("/")[-1] for leftover in found} >= {"0123", "attempts"}
    assert clean(run.output) == found and not clean(run.output)
    stays = {"notes.txt", *(n.replace(clean_run.settings.output, "") for n in names(Path(clean_run.settings.output)))}
    left = {name for name in names(output) ^ stays if "/u0" not in name}
    assert not left, "more or less is left than in an output that was never killed"
    assert len(names(output)) == len(stays)
    assert verify(run.output)["rows"] == 20
    if mode != "none":
        verdict = check(inputs, run.settings.output)
        assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])


def test_refused_while_unfinished_or_at_work(inputs: list[str], tmp_path: Path) -> None:
    run = LedgerRun(inputs, new_output(tmp_path))
    assert exit_code(in_child(run.drive, "commit.after:3:exit")) == FAILPOINT_EXIT_CODE
    with pytest.raises(VerificationError, match="not finished"):
        clean(run.output)
    run.drive()
    (run.output / "_SUCCESS").delete()
    with pytest.raises(VerificationError, match="must be finished to be cleaned"):
        clean(run.output)
    run.drive()
    with Lease(run.ledger.work), pytest.raises(OwnedElsewhereError):
        clean(run.output)


def test_on_s3(inputs: list[str], s3_server: str) -> None:
    run = LedgerRun(inputs, f"{s3_server}/clean", mode="none")
    run.drive()
    (run.ledger.data / "u00000001-zombie.parquet").write_atomic(b"an orphan")
    assert [leftover.path.split("/")[-1] for leftover in clean(run.output)] == ["u00000001-zombie.parquet"]
    assert verify(Location.parse(run.output.url))["rows"] == 20
