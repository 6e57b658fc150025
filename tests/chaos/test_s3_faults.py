"""An object store that fails: each storage operation in turn, and a server behind a proxy that fails at random."""

import os
import random
import uuid
from collections.abc import Callable
from urllib.parse import urlparse

import fsspec
import pytest
from checker import check
from job_helpers import write_input
from ledger_run import LedgerRun, exit_code, in_child
from proxy import FaultProxy

from s2s_ray.failpoints import FAILPOINT_EXIT_CODE
from s2s_ray.pipelines.publish import finished, verify
from s2s_ray.storage import Location

SEED = 20250
ROWS = 22
UNITS = 3
PATIENT = {"config_kwargs": {"connect_timeout": 2, "read_timeout": 2, "retries": {"max_attempts": 2}}}
pytestmark = pytest.mark.timeout(1800)  # with --full, on a busy machine


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_input(tmp_path_factory.mktemp("input"), [f"text {row}" for row in range(ROWS)], files=3, group=8)


def judged(run: LedgerRun) -> tuple[int, int]:
    """(rows lost, rows doubled) of a finished output on S3; anything else that is wrong fails here."""
    filesystem, path = run.output.filesystem_for_arrow()
    verdict = check(run.inputs, path, output_filesystem=filesystem)
    assert verdict.problems == [] and verify(run.output)["rows"] == verdict.rows
    return len(verdict.lost), len(verdict.doubled)


def test_crash_at_storage_operations_of_s3(
    inputs: list[str], s3_server: str, pytestconfig: pytest.Config, record: Callable[..., None]
) -> None:
    """P4 on an object store: the process ends, or the request fails, before or after each operation took effect."""
    original = LedgerRun(inputs, f"{s3_server}/{uuid.uuid4().hex}", rows_per_unit=8)
    full = pytestconfig.getoption("--full")
    operations = list(range(1, 1000)) if full else sorted(random.Random(SEED).sample(range(5, 55), 2))
    injected = lost = doubled = 0
    for action in ("exit", "eio"):
        codes = []
        for operation in operations:
            url = f"{s3_server}/{uuid.uuid4().hex}"
            codes.append(exit_code(in_child(lambda url=url: original.to(url).drive(), f"*:{operation}:{action}")))
            run = original.to(url)
            complete = finished(run.ledger) is not None
            committed = run.ledger.committed()
            assert run.drive() == (0 if complete else UNITS - len(committed))
            found = judged(run)
            injected, lost, doubled = injected + 1, lost + found[0], doubled + found[1]
            if full and codes[-3:] == [0, 0, 0] and operation > 60:
                break
        assert set(codes) <= {0, FAILPOINT_EXIT_CODE if action == "exit" else 1}
        assert action == "eio" or FAILPOINT_EXIT_CODE in codes
    record(
        "storage operation on S3: exit, I/O error", injected=injected, rows=injected * ROWS, lost=lost, doubled=doubled
    )
    assert (lost, doubled) == (0, 0)


@pytest.mark.parametrize(
    "rate", [0.1, pytest.param(0.01, marks=pytest.mark.full), pytest.param(0.3, marks=pytest.mark.full)]
)
def test_a_server_that_fails_at_random(
    inputs: list[str], s3_server: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, rate: float,
    record: Callable[..., None],
) -> None:  # fmt: skip
    """P7: 500, 503, resets, stalls beyond the timeout, and answers lost after the write, at every kind of request."""
    address = urlparse(os.environ["AWS_ENDPOINT_URL"])
    clean = LedgerRun(inputs, f"{s3_server}/unused", rows_per_unit=8)
    injected = lost = doubled = generated = runs = 0
    for seed in range(SEED, SEED + (6 if pytestconfig.getoption("--full") else 1)):
        print(f"rate {rate}, seed {seed}")
        url = f"{s3_server}/{uuid.uuid4().hex}"
        with (
            FaultProxy((str(address.hostname), int(address.port or 80)), rate, seed) as proxy,
            monkeypatch.context() as patch,
        ):
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            patch.setitem(fsspec.config.conf, "s3", PATIENT)
            for attempt in range(20):  # a job that gave up with 75 is run again
                try:
                    generated += faulty(clean, url).drive()
                    break
                except OSError:
                    assert attempt < 19, "twenty runs were not enough"
        assert proxy.requests > 30 and (rate < 0.1 or proxy.injected)
        injected += proxy.injected.total()
        runs += 1
        fsspec.filesystem("s3").clear_instance_cache()
        found = judged(clean.to(url))
        lost, doubled = lost + found[0], doubled + found[1]
    waste = generated / (runs * UNITS)
    record(
        f"S3 requests fail, {rate:.0%}", injected=injected, rows=runs * ROWS, lost=lost, doubled=doubled, waste=waste
    )
    assert (lost, doubled) == (0, 0) and waste < 2


def faulty(run: LedgerRun, url: str) -> LedgerRun:
    """The run on a filesystem that was made anew, so that it talks to the proxy."""
    fsspec.filesystem("s3").clear_instance_cache()
    other = run.to(url)
    assert isinstance(other.output, Location)
    return other
