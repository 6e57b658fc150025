"""P8: a replica that takes more memory than there is, at a marked row, and is killed for it: by Ray, by the kernel.

Long: --full. The job lives in a memory cgroup of its own, which it sees as the machine's memory, as in a container;
skipped where that is not allowed. `failpoints.py` takes the memory.
"""

import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checker import check
from job_helpers import run_job, wait_for, write_input

from s2s_ray.pipelines.publish import verify
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.storage import Location

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
ROWS, UNIT, CULPRIT = 16, 2, 6
LIMIT = 6 * 2**30  # bytes of the cgroup; a job with one replica takes 1 to 2 GiB
Record = Callable[..., None]


class Container:
    """A memory cgroup (v1 or v2). `command` runs something inside, which sees it as the whole machine's memory."""

    def __init__(self, limit: int) -> None:
        legacy = Path("/sys/fs/cgroup/memory")
        self.root = legacy if legacy.is_dir() else Path("/sys/fs/cgroup")
        self.limit = "memory.limit_in_bytes" if legacy.is_dir() else "memory.max"
        self.path = self.root / f"s2s_ray_{uuid.uuid4().hex[:8]}"
        try:
            self.path.mkdir()
            (self.path / self.limit).write_text(str(limit))
            subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"memory cgroups cannot be made here: {error}")

    @property
    def command(self) -> list[str]:
        inside = f'echo $$ > {self.path}/cgroup.procs && mount --bind {self.path} {self.root} && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", inside, "sh"]

    def kernel_kills(self) -> int:
        """How many processes the kernel's out-of-memory killer has ended in here."""
        events = (self.path / ("memory.events" if self.limit == "memory.max" else "memory.oom_control")).read_text()
        return {name: int(number) for name, number in map(str.split, events.splitlines())}["oom_kill"]

    def remove(self) -> None:
        wait_for(lambda: not (self.path / "cgroup.procs").read_text().strip(), what="the end of the job's processes")
        self.path.rmdir()


@pytest.fixture
def container() -> Iterator[Container]:
    container = Container(LIMIT)
    yield container
    container.remove()


@pytest.mark.parametrize("killer", ["kernel", "Ray"])
def test_a_row_that_takes_too_much_memory(
    container: Container, killer: str, english_text: list[str], tiny_bart_dir: Path, tmp_path: Path, record: Record
) -> None:
    """The worker is killed again and again; the row is found, all others are answered as ever."""
    texts = [text[: 30 + row % 50] for row, text in enumerate(english_text[:ROWS])]
    inputs = write_input(tmp_path / "in", texts)
    output = tmp_path / "out"
    job = ["--input", *inputs, "--output", str(output), "--preset", str(tiny_bart_dir), "--max-target-length", "6"]
    job += ["--rows-per-unit", str(UNIT), "--num-replicas", "1"]
    # Ray looks four times a second; until then the row holds what it took: more than Ray allows, less than the kernel.
    taken = "memory=8000" if killer == "kernel" else "memory=3600"
    settings = {
        "S2S_RAY_FAILPOINT": f"row.{CULPRIT}:0:{taken},row.{CULPRIT}:0:sleep=20",
        "RAY_memory_monitor_refresh_ms": "0" if killer == "kernel" else "250",
        "RAY_memory_usage_threshold": "0.6",
    }
    code, _, error = run_job("generate.py", *job, timeout=1200, prefix=container.command, **settings)
    kills, starts = container.kernel_kills(), len(list(output.glob("_s2s/*/attempts/*.[123]")))
    print(f"{kills} kills by the kernel, {starts} starts of units and rows")
    assert code == 3, error
    assert kills >= 6 if killer == "kernel" else kills == 0
    verdict = check(inputs, str(output))
    lost, doubled = len(verdict.lost), len(verdict.doubled)
    name = "out of memory at a row: killed by the kernel" if killer == "kernel" else "the same: killed by Ray"
    record(name, injected=kills or starts - ROWS // UNIT, rows=ROWS, lost=lost, doubled=doubled)
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    assert {e["row"]: e["reason"] for e in verdict.errors.to_pylist()} == {CULPRIT: "CRASHED_WORKER"}
    expected = enumerate(Seq2SeqLM.from_preset(tiny_bart_dir).generate(texts, max_new_tokens=6))
    assert verdict.summaries() == {row: text for row, text in expected if row != CULPRIT}
    verify(Location.parse(output))
