"""P6: disks that are really full, small tmpfs mounts: the output's, and the one Ray has its session and spills on.

Long: --full. Skipped where mounting is not allowed. `test_cluster.py` and `test_ledger_faults.py` fail single writes.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checker import check
from job_helpers import JobProcess, run_job, wait_for, write_input

from s2s_ray.pipelines.publish import verify
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.storage import Location

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
ROWS, UNIT = 64, 4
KIB, MIB = 2**10, 2**20
SLOW = {"S2S_RAY_FAILPOINT": "row.*:0:sleep=0.1"}
Record = Callable[..., None]


class SmallDisk:
    """A tmpfs of a few KiB, which may grow."""

    def __init__(self, size: int) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="s2s"))  # a short name: Ray's sockets lie below
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            self.path.rmdir()
            pytest.skip("mounting a tmpfs is not allowed here")

    def resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    def fill(self) -> int:
        """Take what is left; the bytes that took."""
        ballast = self.path / "ballast"
        with ballast.open("ab", buffering=0) as stream:
            try:
                while stream.write(b"\0" * 4096):
                    pass
            except OSError:
                return stream.tell()
        raise AssertionError("unreachable")

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.path.rmdir()


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    disk = SmallDisk(120 * KIB)
    yield disk
    disk.remove()


@pytest.fixture(scope="module")
def texts(english_text: list[str]) -> list[str]:
    return [text[: 30 + row % 50] for row, text in enumerate(english_text[:ROWS])]


@pytest.fixture(scope="module")
def expected(texts: list[str], tiny_bart_dir: Path) -> dict[int, str]:
    return dict(enumerate(Seq2SeqLM.from_preset(tiny_bart_dir).generate(texts, max_new_tokens=6)))


def flags(inputs: list[str], preset: Path, output: Path) -> list[str]:
    places = ["--input", *inputs, "--output", str(output), "--preset", str(preset)]
    return [*places, "--max-target-length", "6", "--rows-per-unit", str(UNIT)]


def judge(inputs: list[str], output: Path, expected: dict[int, str], record: Record, fault: str, injected: int) -> None:
    verdict = check(inputs, str(output))
    record(fault, injected=injected, rows=ROWS, lost=len(verdict.lost), doubled=len(verdict.doubled))
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    assert verdict.summaries() == expected
    verify(Location.parse(output))


def test_the_output_is_on_a_full_disk(
    disk: SmallDisk, texts: list[str], expected: dict[int, str], tiny_bart_dir: Path, tmp_path: Path, record: Record
) -> None:
    """Exit 75 and no manifest; with space the job goes on where it was."""
    inputs = write_input(tmp_path / "in", texts, files=2, group=16)
    output = disk.path / "out"
    job = flags(inputs, tiny_bart_dir, output)
    committed = [0]
    for size in (120 * KIB, 200 * KIB):
        disk.resize(size)
        code, _, error = run_job("generate.py", *job)
        assert code == 75 and "No space left" in error, error
        assert not {path.name for path in output.iterdir()} & {"_manifest.json", "_SUCCESS"}
        committed.append(len(list(output.glob("_s2s/*/commit/u*.json"))))
        assert committed[-1] >= committed[-2]
    assert 0 < committed[2] < ROWS / UNIT, f"the disks were not of the sizes to fill while units commit: {committed}"
    disk.resize(64 * MIB)
    code, _, error = run_job("generate.py", *job)
    assert code == 0, error
    judge(inputs, output, expected, record, "output's disk is full (tmpfs)", 2)


def test_rays_directory_is_on_a_full_disk(
    disk: SmallDisk, texts: list[str], expected: dict[int, str], tiny_bart_dir: Path, tmp_path: Path, record: Record
) -> None:
    """No place for logs and spilled objects, while more passes than the object store holds: done, or 75 and resumed."""
    disk.resize(64 * MIB)
    (path,) = write_input(tmp_path / "in", texts)
    noise = [os.urandom(3 * MIB // 2) for _ in texts]  # 96 MiB, carried along with the texts
    table = pq.read_table(path).append_column("noise", pa.array(noise, pa.binary()))
    pq.write_table(table, path, row_group_size=UNIT, compression="none")
    output = tmp_path / "out"
    job = [*flags([path], tiny_bart_dir, output), "--stall-timeout", "120"]
    small = {"RAY_TMPDIR": str(disk.path), "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * MIB)}
    first = JobProcess("generate.py", *job, **small, **SLOW)
    try:
        wait_for(lambda: list(output.glob("_s2s/*/commit/u*.json")), what="a first commit")
        assert disk.fill() > MIB
        code, _, error = first.finish(900)
    finally:
        first.process.kill()
    print(f"with a full disk the job ended with {code}: {error[-300:]}")
    assert code in (0, 75), error
    if code == 75:
        assert {path.name for path in output.iterdir()} <= {"_s2s"}
        code, _, error = run_job("generate.py", *job)
        assert code == 0, error
    judge([path], output, expected, record, "Ray's disk is full (tmpfs)", 1)
