"""Faults at the ledger, without Ray: a crash at every storage operation, lost answers, zombies, races."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checker import check
from job_helpers import wait_for, write_input
from ledger_run import LedgerRun, exit_code, in_child, new_output

from s2s_ray import failpoints
from s2s_ray.errors import InfrastructureError, VerificationError
from s2s_ray.failpoints import FAILPOINT_EXIT_CODE, FAILPOINT_VARIABLE
from s2s_ray.pipelines.ledger import Shard
from s2s_ray.pipelines.plan import Unit
from s2s_ray.pipelines.publish import build_manifest, finished, verify
from s2s_ray.storage import Location

OPERATIONS = 75  # at least so many points of failure are in one small run
TEXTS = [f"text {row}" for row in range(22)]
pytestmark = pytest.mark.timeout(1800)  # with --full, on a busy machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_input(tmp_path_factory.mktemp("input"), TEXTS, files=3, group=5)


def assert_sound(inputs: list[str], output: str) -> None:
    verdict = check(inputs, output)
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    assert (verdict.rows, verdict.error_rows) == (20, 2)
    assert verdict.summaries() == {row: f"summary of {row}" for row in range(22) if row % 10 != 3}
    assert verify(Location.parse(output))["rows"] == 20


def count_operations(run: LedgerRun, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many points of failure one whole run passes."""
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "_calls", {})
        patch.setenv(FAILPOINT_VARIABLE, "*:0:sleep=0")
        run.drive()
        return sum(failpoints._calls.values())


@pytest.mark.parametrize("number,action", enumerate(["exit", "eio", "enospc"]))
def test_crash_at_every_storage_operation(
    inputs: list[str], tmp_path: Path, number: int, action: str, record: Callable[..., None],
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """P4: whatever the operation that fails, before or after it took effect, a rerun completes the output.

    All of them with --full, otherwise a third for each way to fail.
    """
    original = LedgerRun(inputs, new_output(tmp_path), rows_per_unit=8)
    operations = range(1, count_operations(original, monkeypatch) + 1)
    if not pytestconfig.getoption("--full"):
        operations = operations[number::3]
    codes = []
    for operation in operations:
        run = original.to(new_output(tmp_path))
        codes.append(exit_code(in_child(run.drive, f"*:{operation}:{action}")))
        assert action != "enospc" or not list(Path(run.settings.output).rglob(".*.tmp")), "half a file keeps it full"
        complete = finished(run.ledger) is not None
        committed = len(run.ledger.committed())
        generated = run.drive()
        assert generated == (0 if complete else len(run.plan.units) - committed), "a committed unit is not made again"
        assert_sound(inputs, run.settings.output)
    injected = len(codes)
    record(f"storage operation on a disk: {action}", injected=injected, rows=injected * 22, lost=0, doubled=0)
    assert injected > OPERATIONS / 3
    assert set(codes) <= {0, FAILPOINT_EXIT_CODE if action == "exit" else 1}
    if action == "exit":
        assert codes.count(FAILPOINT_EXIT_CODE) > 0.9 * injected
    if action == "enospc":
        assert codes.count(1) > injected / 2  # a full disk is not tried again
    if action == "eio":
        assert codes.count(0) > injected / 2  # a passing fault is


def test_a_lost_answer_to_the_commit_is_read_back(inputs: list[str], tmp_path: Path) -> None:
    run = LedgerRun(inputs, new_output(tmp_path))
    run.ledger.claim(run.document)
    # Each create in turn takes effect but its answer is lost.
    for nth in (1, 2, 3):
        unit = run.plan.units[nth]
        commit = in_child(
            lambda unit=unit: run.ledger.commit(unit.id, unit.rows, run.shards[unit.id]), "create.after:1:eio"
        )
        assert exit_code(commit) == 0
    assert run.ledger.committed() == {1, 2, 3}
    assert len(run.ledger.data.list_names()) == 3
    run.drive()
    assert_sound(inputs, run.settings.output)


def test_counts_must_add_up(inputs: list[str], tmp_path: Path) -> None:
    run = LedgerRun(inputs, new_output(tmp_path))
    with pytest.raises(InfrastructureError, match="must have 9 rows"):
        run.ledger.commit(0, 9, Shard(b"", 5, None, 3, 0, {}))
    run.ledger.store_plan(run.plan)
    run.ledger.commit(0, run.plan.units[0].rows, run.shards[0])
    with pytest.raises(InfrastructureError, match="all 7 units must be committed"):
        build_manifest(run.ledger, run.plan, run.document, "rename")
    wrong = dataclasses.replace(run.plan, units=run.plan.units[:1] * 7)
    with pytest.raises(InfrastructureError):
        build_manifest(run.ledger, wrong, run.document, "rename")


def test_zombie_writers_leave_orphans(
    inputs: list[str], tmp_path: Path, pytestconfig: pytest.Config, record: Callable[..., None]
) -> None:
    """P5: a writer that sleeps between shard and commit, while another run finishes and publishes, changes nothing.

    Twenty of them with --full, a different unit each time.
    """
    zombies = 20 if pytestconfig.getoption("--full") else 1
    for number in range(zombies):
        run = LedgerRun(inputs, new_output(tmp_path))
        run.ledger.claim(run.document)
        unit = run.plan.units[(2 + number) % len(run.plan.units)]

        def commit_late(run: LedgerRun = run, unit: Unit = unit) -> None:
            commit = run.ledger.commit(unit.id, unit.rows, run.shards[unit.id])
            assert commit.attempt == run.ledger.read(unit.id).attempt

        zombie = in_child(commit_late, "commit.before:1:sleep=1.5")
        wait_for(lambda run=run: run.ledger.data.list_names(), what="the zombie's shard")
        run.drive()
        before = (run.output / "_manifest.json").read_bytes()
        assert_sound(inputs, run.settings.output)
        assert exit_code(zombie) == 0
        assert (run.output / "_manifest.json").read_bytes() == before
        assert_sound(inputs, run.settings.output)
        assert not run.ledger.data.list_names()
    record("a writer sleeps through the publication", injected=zombies, rows=zombies * 22, lost=0, doubled=0)


def test_drivers_forced_together(
    inputs: list[str], tmp_path: Path, pytestconfig: pytest.Config, record: Callable[..., None]
) -> None:
    """P21: without the lease, any number of drivers of one run give one sound output. Twenty races with --full."""
    races = 20 if pytestconfig.getoption("--full") else 3
    for _ in range(races):
        run = LedgerRun(inputs, new_output(tmp_path))
        drivers = [in_child(run.drive) for _ in range(6)]
        assert [exit_code(pid) for pid in drivers] == [0] * 6
        assert_sound(inputs, run.settings.output)
    record("six drivers at once, without a lease", injected=races, rows=races * 22, lost=0, doubled=0)


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_drivers_forced_together_one_slow_in_publishing(inputs: list[str], tmp_path: Path, nth: int) -> None:
    run = LedgerRun(inputs, new_output(tmp_path))
    slow = in_child(run.drive, f"link.before:{nth}:sleep=1")
    time.sleep(0.3)
    run.drive()
    assert exit_code(slow) == 0
    assert_sound(inputs, run.settings.output)


@pytest.mark.parametrize("mode", ["auto", "copy", "none"])
def test_on_s3(inputs: list[str], s3_server: str, mode: str) -> None:
    """The same ledger on an object store, in each way of publishing; a second driver finds it complete."""
    run = LedgerRun(inputs, f"{s3_server}/ledger-{mode}", mode=mode)
    assert run.drive() == len(run.plan.units) and run.drive() == 0
    manifest = verify(run.output)
    assert manifest["rows"] == 20 and manifest["publish"] == ("none" if mode == "none" else "copy")
    names = run.output.list_names()
    assert ("part-00000000.parquet" in names) == (mode != "none")
    assert bool(run.ledger.data.list_names()) == (mode == "none")


def damaged(inputs: list[str], directory: Path, name: str, damage: Callable[[Path], object]) -> str:
    """What `verify` says of a finished output after `damage` to one of its files."""
    run = LedgerRun(inputs, new_output(directory))
    run.drive()
    damage(next(Path(run.settings.output).rglob(name), Path(run.settings.output) / name))
    with pytest.raises(VerificationError) as caught:
        verify(run.output)
    return str(caught.value)


def replace(old: bytes, new: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    "name,damage,message",
    [
        ("part-00000001.parquet", Path.unlink, "part-00000001.parquet: missing"),
        ("part-00000001.parquet", lambda path: path.write_bytes(b"short"), "5 bytes, the manifest says"),
        ("part-00000002.parquet", replace(b"PAR1", b"PAR2"), "part-00000002.parquet: sha256"),
        ("_errors/part-00000000.parquet", replace(b"PAR1", b"PAR2"), "_errors/part-00000000.parquet: sha256"),
        (
            "part-00000099.parquet",
            lambda path: path.write_bytes(b"stray"),
            "part-00000099.parquet: not in the manifest",
        ),
        ("_SUCCESS", Path.unlink, "_SUCCESS is missing"),
        ("_manifest.json", Path.unlink, "must hold _manifest.json"),
        ("_manifest.json", replace(b'"num_beams":null', b'"num_beams":1'), "do not hash to its fingerprint"),
        ("_manifest.json", replace(b'"first_row":5', b'"first_row":6'), "unit 2 starts at row 6"),
        ("_manifest.json", replace(b'"parts"', b'"part"'), "must have the form of a manifest"),
        ("_manifest.json", lambda path: path.write_bytes(b'{"a": 1, "a": 2}'), "must be plain JSON"),
        ("plan.parquet", replace(b"PAR1", b"PAR2"), "plan.parquet: sha256"),
        ("u00000001.json", Path.unlink, "all 7 units must be committed"),
        ("u00000001.json", replace(b'"sha256":"', b'"sha256":"0'), "not what the commit records"),
    ],
)
def test_verify_names_what_does_not_match(
    inputs: list[str], tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    assert message in damaged(inputs, tmp_path, name, damage)
