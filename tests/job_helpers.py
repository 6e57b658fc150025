"""What the tests of jobs share: input data, jobs in processes of their own, and their replicas' pids."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
MARKER = "S2S_RAY_TEST_JOB"


def write_input(directory: Path, texts: Sequence[str | None], files: int = 1, group: int = 64) -> list[str]:
    """Parquet files with `id` (the row's position), `text` and a nested column; row groups of `group` rows."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(files):
        start, stop = len(texts) * index // files, len(texts) * (index + 1) // files
        table = pa.table(
            {
                "id": pa.array(range(start, stop), pa.int64()),
                "text": pa.array(texts[start:stop], pa.string()),
                "tags": pa.array([[f"t{i}", None] for i in range(start, stop)], pa.list_(pa.string())),
            }
        )
        path = directory / f"in-{index:03d}.parquet"
        pq.write_table(table, path, row_group_size=group)
        paths.append(str(path))
    return paths


class JobProcess:
    """A job script in a process of its own, with a Ray of its own."""

    def __init__(self, script: str, *arguments: str, prefix: Sequence[str] = (), **environment: str) -> None:
        """prefix: a command that starts the job in surroundings of its own."""
        self.marker = uuid.uuid4().hex
        # Files and no pipes: nobody reads before the end, and Ray's messages about a lost node fill a pipe.
        self._written = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(ROOT / "jobs" / script), *arguments],
            env=job_environment(**{MARKER: self.marker}, **environment),
            stdout=self._written[0],
            stderr=self._written[1],
            cwd=ROOT,
        )

    def finish(self, timeout: float = 400) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for file in self._written:
            file.seek(0)
        out, error = (file.read() for file in self._written)
        return code, out, error

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def replica_pids(self) -> list[int]:
        """Processes of this job's actors that are through with starting."""
        return [pid for pid, title in _processes(self.marker) if "MapWorker(MapBatches(Replica))" in title]


def job_environment(**extra: str) -> dict[str, str]:
    """This environment, with the package importable, and without a Ray address or failpoint of someone else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "S2S_RAY_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", **extra}  # Ray's 15 starves on a busy machine


def run_job(script: str, *arguments: str, timeout: float = 400, **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a job."""
    return JobProcess(script, *arguments, **environment).finish(timeout)


def wait_for(condition: Callable[[], Any], timeout: float = 300, what: str = "the condition") -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout} s for {what}")


def kill_all(marker: str) -> None:
    """SIGKILL for every process that carries this marker in its environment."""
    for pid, _ in _processes(marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _processes(marker: str) -> list[tuple[int, str]]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                if f"{MARKER}={marker}".encode() in (directory / "environ").read_bytes():
                    found.append((int(directory.name), (directory / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue
    return found
