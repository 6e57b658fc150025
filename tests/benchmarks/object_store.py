"""What a running generate job holds in Ray's object store and in its driver, while its commits are slow.

    python -m tests.benchmarks.object_store --units 50 100 200 --commit-seconds 0 0.5
    python -m tests.benchmarks.object_store --units 1000 --kib-per-row 0 --rows-per-unit 1 10

Every row carries `--kib-per-row` of noise; units x rows x that passes through the store. What waits before the slow
stage must be bounded, whatever the number of units. A job is a process with a Ray of its own, whose object store has
`--store-mib`. Texts are blank, which needs no model: what is measured is the pipeline. Ends with one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def write_input(path: Path, units: int, rows: int, kib: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("noise", pa.binary())])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for unit in range(units):
            ids = range(unit * rows, (unit + 1) * rows)
            noise = [os.urandom(kib * 1024) for _ in ids]
            writer.write_table(pa.table([ids, [""] * rows, noise], schema=schema), row_group_size=rows)


def measure(preset: str, units: int, rows: int, kib: int, seconds: float, store_mib: int) -> dict[str, Any]:
    """One job; runs in a process of its own, for its peak memory and its Ray."""
    import ray

    from s2s_ray.pipelines.generate import run
    from s2s_ray.pipelines.settings import GenerateSettings

    os.environ["S2S_RAY_FAILPOINT"] = f"commit.before:0:sleep={seconds}"
    with tempfile.TemporaryDirectory() as directory:
        write_input(Path(directory) / "in.parquet", units, rows, kib)
        ray.init(
            address="local", num_cpus=4, object_store_memory=store_mib * MIB, include_dashboard=False,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        watch = Watch()
        settings = GenerateSettings(
            input=(f"{directory}/in.parquet",), output=f"{directory}/out", preset=preset, rows_per_unit=rows
        )
        start = time.perf_counter()
        report = run(settings)
        elapsed = time.perf_counter() - start
        used, spilled = watch.stop()
        ray.shutdown()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert report.rows == units * rows and report.exit_code == 0
    return {
        "units": units, "rows": units * rows, "commit_s": seconds, "passed_mib": units * rows * kib / 1024,
        "store_mib": used, "spilled_mib": spilled, "driver_mib": peak, "seconds": elapsed,
    }  # fmt: skip


class Watch(threading.Thread):
    """Looks at this node's object store ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._done = threading.Event()
        self._peak = self._spilled = 0
        self.start()

    def run(self) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self._done.wait(0.1):
            stats = get_memory_info_reply(state).store_stats
            self._peak = max(self._peak, stats.object_store_bytes_used)
            self._spilled = max(self._spilled, stats.spilled_bytes_total)

    def stop(self) -> tuple[float, float]:
        """(most MiB in use at one time, MiB spilled to disk)"""
        self._done.set()
        self.join()
        return self._peak / MIB, self._spilled / MIB


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debian_summarizer_en")
    parser.add_argument("--units", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--rows-per-unit", type=int, nargs="+", default=[4])
    parser.add_argument("--kib-per-row", type=int, default=256)
    parser.add_argument("--commit-seconds", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--store-mib", type=int, default=100)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    units, rows, seconds = options.units, options.rows_per_unit, options.commit_seconds
    if options.child:
        found = measure(options.preset, units[0], rows[0], options.kib_per_row, seconds[0], options.store_mib)
        print(json.dumps(found))
        return
    results: list[dict[str, Any]] = []
    for one in ((u, r, s) for s in seconds for r in rows for u in units):
        command = [sys.executable, "-m", "tests.benchmarks.object_store", "--child", "--preset", options.preset]
        for name, value in zip(("--units", "--rows-per-unit", "--commit-seconds"), one, strict=True):
            command += [name, str(value)]
        command += ["--kib-per-row", str(options.kib_per_row), "--store-mib", str(options.store_mib)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        if len(results) == 1:
            print(" ".join(f"{name:>12}" for name in results[0]))
        print(" ".join(f"{value:12.1f}" for value in results[-1].values()), flush=True)
    print(json.dumps({"benchmark": "object_store", "store_mib": options.store_mib, "results": results}))


if __name__ == "__main__":
    main()
