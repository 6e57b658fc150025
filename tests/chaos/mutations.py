"""Do the tests see a broken committer? Plants one bug at a time in a copy of the package, runs the fault tests there.

python tests/chaos/mutations.py            # all; ends with 0 if every bug was caught
python tests/chaos/mutations.py 3 7        # some of them
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TESTS = (
    "tests/chaos/test_ledger_machine.py",
    "tests/chaos/test_ledger_faults.py",
    "tests/pipelines/test_lease.py",
)


@dataclass(frozen=True)
class Bug:
    what: str
    file: str
    old: str
    new: str


BUGS = (
    Bug(
        "the commit record is a plain write: the last one wins",
        "retries.py",
        "            if path.create_exclusive(content):\n                return True\n            break\n",
        "            path.write_atomic(content)\n            return True\n",
    ),
    Bug("attempts share one name", "ledger.py", "attempt = uuid.uuid4().hex", 'attempt = "0" * 32'),
    Bug(
        "no reading back: an unknown result is a lost race",
        "retries.py",
        "return is_ours(retrying(path.read_bytes))",
        "return False",
    ),
    Bug(
        "the loser of a race believes it has won",
        "ledger.py",
        "lambda found: self._decode(found, path).attempt == attempt",
        "lambda _: True",
    ),
    Bug("the loser removes the winner's shard", "ledger.py", "self._discard(record)", "self._discard(winner)"),
    Bug(
        "the record comes before the shard",
        "ledger.py",
        "        retrying(lambda: (directory / name).write_atomic(content))\n",
        "        record = Commit(unit, attempt, 0, 0, 0, {}, StoredFile(name, 0, ''), None)\n"
        "        create(self._record(unit), record.encode(), lambda found: True)\n"
        "        retrying(lambda: (directory / name).write_atomic(content))\n",
    ),
    Bug(
        "published before every unit is committed",
        "publish.py",
        "    if [commit.unit for commit in commits] != [unit.id for unit in plan.units]:",
        "    if len(commits) < len(plan.units):\n        plan = Plan(plan.units[: len(commits)], plan.schema, {})\n"
        "    elif False:",
    ),
    Bug(
        "the manifest comes before the parts",
        "publish.py",
        '    if mode != "none":\n        _copy_all(ledger, manifest, link=mode == "rename")\n',
        "    retrying(lambda: (ledger.output / MANIFEST).write_atomic(canonical_json(manifest)))\n"
        '    if mode != "none":\n        _copy_all(ledger, manifest, link=mode == "rename")\n',
    ),
    Bug(
        "an attempt whose commit has an unknown result removes its shard",
        "ledger.py",
        "        if create(path, record.encode(), lambda found: self._decode(found, path).attempt == attempt):\n",
        "        try:\n"
        "            won = create(path, record.encode(), lambda found: self._decode(found, path).attempt == attempt)\n"
        "        except OSError:\n"
        "            self._discard(record)\n"
        "            raise\n"
        "        if won:\n",
    ),
    Bug("committed units are generated again", "ledger.py", "return {int(name[1:9]) for name", "return {-1 for name"),
    Bug("counts are not checked", "ledger.py", "if shard.rows + shard.error_rows != planned_rows:", "if False:"),
    Bug("a live owner's lease is taken", "lease.py", "if owner is not None and not _is_stale(owner):", "if False:"),
)


def caught(bug: Bug | None, directory: Path) -> tuple[bool, str]:
    """(whether a test failed, its name) with `bug` planted in a copy of the checkout."""
    copy = directory / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", ".git")
    for name in ("s2s_ray", "tests", "jobs"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", copy)
    if bug is not None:
        path = copy / "s2s_ray" / "pipelines" / bug.file
        source = path.read_text("utf-8")
        assert source.count(bug.old) == 1, f"{bug.file} must hold this once, to plant {bug.what!r}: {bug.old!r}"
        path.write_text(source.replace(bug.old, bug.new), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout=120", "--tb=no", *TESTS]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    failed = next((line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED")), "")
    return done.returncode == 1, failed.removeprefix("FAILED ")


def main(numbers: list[int]) -> int:
    chosen = [BUGS[number - 1] for number in numbers] or list(BUGS)
    with tempfile.TemporaryDirectory() as directory:
        failed, test = caught(None, Path(directory))
        if failed:
            print(f"the tests must pass without a bug; {test} fails")
            return 2
        found = 0
        for bug in chosen:
            is_caught, test = caught(bug, Path(directory))
            found += is_caught
            print(f"{'caught' if is_caught else 'MISSED'}  {bug.what}  {test}", flush=True)
    print(f"{found} of {len(chosen)} caught")
    return 0 if found == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
