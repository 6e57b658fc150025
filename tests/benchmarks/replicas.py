"""Does a job's throughput follow the number of its replicas, and does a fixed pool start all of them (ray #59144)?

    python -m tests.benchmarks.replicas --replicas 1 2 3 --units 40 --seconds 2

Every unit sleeps `--seconds` at its replica, so the figures are of the pipeline and hold on a machine with few cores.
One job per line, on a Ray of its own: when all replicas were there, and the rate from then until the pool runs dry,
by the times of the commit records. Ends with one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.job_helpers import JobProcess, wait_for, write_input

UNIT = 4  # rows


def measure(preset: str, replicas: int, units: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        inputs = write_input(Path(directory) / "in", [f"text {row}" for row in range(units * UNIT)])
        output = Path(directory) / "out"
        flags = ["--input", *inputs, "--output", str(output), "--preset", preset, "--max-target-length", "2"]
        flags += ["--rows-per-unit", str(UNIT), "--num-replicas", str(replicas)]
        start = time.time()
        job = JobProcess("generate.py", *flags, S2S_RAY_FAILPOINT=f"row.*:0:sleep={seconds / UNIT}")
        try:
            wait_for(lambda: len(job.replica_pids()) == replicas, what=f"{replicas} replicas", timeout=600)
            all_there = time.time()
            code, _, error = job.finish(1200)
        finally:
            job.process.kill()
        assert code == 0, error
        commits = sorted(path.stat().st_mtime for path in output.glob("_s2s/*/commit/u*.json"))
    # At the end some replicas have no unit left: the last `replicas` commits say nothing about the rate.
    steady = [moment for moment in commits if moment > all_there][: -replicas or None]
    assert len(steady) > 4, "the replicas were there too late; give more units"
    rate = (len(steady) - 1) / (steady[-1] - steady[0])
    return {"replicas": replicas, "started_s": all_there - start, "units": len(steady), "units_per_s": rate,
            "of_possible": rate * seconds / replicas}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="debian_summarizer_en")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=2.0, help="that each unit sleeps at its replica")
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    for replicas in options.replicas:
        results.append(measure(options.preset, replicas, options.units, options.seconds))
        if len(results) == 1:
            print(" ".join(f"{name:>12}" for name in results[0]))
        print(" ".join(f"{value:12.2f}" for value in results[-1].values()), flush=True)
    print(json.dumps({"benchmark": "replicas", "seconds_per_unit": options.seconds, "results": results}))


if __name__ == "__main__":
    main()
