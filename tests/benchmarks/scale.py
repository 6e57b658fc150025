"""How planning, resuming and finishing grow with the number of files, on a local disk and on a moto S3 server.

    python -m tests.benchmarks.scale --files 1000 10000 --stores local s3
    python -m tests.benchmarks.scale --files 1000 10000 100000 --stores local

Every file is a real Parquet file of 10,000 rows, so 100,000 files are 1e9 rows: one unit each, 99% of them committed.
Prints a table and, last, one JSON line. On a machine that is shared, the processor's seconds are the ones to read; the
S3 server runs in a process of its own and is not in them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from s2s_ray.pipelines import plan as planning
from s2s_ray.pipelines.inputs import find_files, output_schema, read_footers
from s2s_ray.pipelines.ledger import Commit, Ledger, StoredFile
from s2s_ray.pipelines.plan import Plan
from s2s_ray.pipelines.publish import build_manifest
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location

ROWS = 10_000
FINISH_AT_MOST = 20_000  # files; beyond that reading every commit record takes too long on a test server
Put = Callable[[str, bytes], None]


def one_file(directory: Path) -> bytes:
    table = pa.table({"id": pa.array([0] * ROWS, pa.int64()), "text": ["a text that is always the same"] * ROWS})
    pq.write_table(table, directory / "one.parquet")
    return (directory / "one.parquet").read_bytes()


def commit_record(unit: int) -> bytes:
    shard = StoredFile(f"u{unit:08d}-{'0' * 32}.parquet", 1000, "0" * 64)
    return Commit(unit, "0" * 32, ROWS, 0, ROWS, {}, shard, None).encode()


def measure(root: str) -> dict[str, Any]:
    """Plan, and store the plan; runs in a process of its own, for its peak memory."""
    start = time.perf_counter()
    settings = GenerateSettings(input=(f"{root}/in",), output=f"{root}/out", preset="none", rows_per_unit=ROWS)
    output = Location.parse(settings.output)
    files = find_files(settings.input, output)
    footers, skipped = read_footers(files, skip_bad=False)
    plan = Plan(planning.cut(footers, ROWS), output_schema(footers, settings), skipped)
    document = planning.document(settings, files, "preset")
    ledger = Ledger(output, planning.fingerprint(document))
    seconds = time.perf_counter() - start
    ledger.claim(document)
    ledger.store_plan(plan)
    assert plan.rows == ROWS * len(files) == ROWS * len(plan.units)
    size = ledger.plan_file.size()
    return {"seconds": seconds, "mib": peak(), "fingerprint": ledger.fingerprint, "plan_bytes": size, "rows": plan.rows}


def resume(root: str, fingerprint: str) -> dict[str, Any]:
    """What a rerun with 99% of the units committed does before the first of the others starts."""
    start = time.perf_counter()
    settings = GenerateSettings(input=(f"{root}/in",), output=f"{root}/out", preset="none", rows_per_unit=ROWS)
    output = Location.parse(settings.output)
    files = find_files(settings.input, output)
    document = planning.document(settings, files, "preset")
    ledger = Ledger(output, planning.fingerprint(document))
    assert ledger.fingerprint == fingerprint
    plan = ledger.stored_plan()
    assert plan is not None
    committed = ledger.committed()
    missing = [unit.encode() for unit in plan.units if unit.id not in committed]
    return {"seconds": time.perf_counter() - start, "mib": peak(), "missing": len(missing)}


def finish(root: str, fingerprint: str) -> dict[str, Any]:
    """The manifest of a run of which every unit is committed."""
    start = time.perf_counter()
    ledger = Ledger(Location.parse(f"{root}/out"), fingerprint)
    plan = ledger.stored_plan()
    assert plan is not None
    manifest = build_manifest(ledger, plan, {}, "none")
    return {"seconds": time.perf_counter() - start, "mib": peak(), "parts": len(manifest["parts"])}


def peak() -> float:
    """MiB of this process at its largest."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor() -> float:
    """Seconds of processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def local_store(content: bytes, count: int) -> Iterator[tuple[str, Put, Counter[str]]]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).absolute()
        (root / "in").mkdir()
        (root / "one").write_bytes(content)
        for index in range(count):
            source = root / "one" if index % 10_000 == 0 else root / "in" / f"f{index // 10_000 * 10_000:07d}.parquet"
            target = root / "in" / f"f{index:07d}.parquet"
            if index % 10_000 == 0:
                target.write_bytes(source.read_bytes())
            else:
                os.link(source, target)  # a file's links are limited, so every ten thousand have one of their own

        def put(name: str, data: bytes) -> None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        yield str(root), put, Counter()


@contextmanager
def s3_store(content: bytes, count: int) -> Iterator[tuple[str, Put, Counter[str]]]:
    """A moto server in this process; objects are put into it directly, requests are counted by method."""
    import threading

    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    requests: Counter[str] = Counter()
    application = DomainDispatcherApplication(create_backend_app)

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        requests[environ["REQUEST_METHOD"]] += 1
        return application(environ, start_response)

    quiet = type("Quiet", (WSGIRequestHandler,), {"log": lambda *_: None, "protocol_version": "HTTP/1.1"})
    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= address | {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    backend = s3_backends["123456789012"]["aws"]
    bucket = f"b{count}"
    backend.create_bucket(bucket, "us-east-1")

    def put(name: str, data: bytes) -> None:
        backend.put_object(bucket, name, data)

    for index in range(count):
        put(f"in/f{index:07d}.parquet", content)
    yield f"s3://{bucket}", put, requests
    server.shutdown()


def in_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(store: str, count: int, content: bytes) -> Iterator[dict[str, Any]]:
    make = local_store if store == "local" else s3_store
    with make(content, count) as (root, put, requests):
        planned = in_child("measure", root)
        yield {"store": store, "files": count, "step": "plan", **planned, "requests": requests.total()}
        fingerprint = planned["fingerprint"]
        for unit in range(count - count // 100):
            put(f"out/_s2s/{fingerprint}/commit/u{unit:08d}.json", commit_record(unit))
        requests.clear()
        found = in_child("resume", root, fingerprint)
        assert found["missing"] == count // 100
        yield {"store": store, "files": count, "step": "resume", **found, "requests": requests.total()}
        if store == "s3" and count > FINISH_AT_MOST:
            return
        for unit in range(count - count // 100, count):
            put(f"out/_s2s/{fingerprint}/commit/u{unit:08d}.json", commit_record(unit))
        requests.clear()
        found = in_child("finish", root, fingerprint)
        yield {"store": store, "files": count, "step": "finish", **found, "requests": requests.total()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--stores", nargs="+", default=["local", "s3"], choices=["local", "s3"])
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        name, *rest = options.child
        before = processor()
        found = {"measure": measure, "resume": resume, "finish": finish}[name](*rest)
        print(json.dumps({**found, "cpu": processor() - before}))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        content = one_file(Path(directory))
    print(f"{'store':6}{'files':>8} {'step':8}{'seconds':>9}{'cpu s':>8}{'peak MiB':>10}{'requests':>10}")
    for store in options.stores:
        for count in options.files:
            for line in run(store, count, content):
                results.append(line)
                cells = f"{line['seconds']:9.2f}{line['cpu']:8.2f}{line['mib']:10.0f}{line['requests']:10d}"
                print(f"{store:6}{count:8d} {line['step']:8}{cells}", flush=True)
    print(json.dumps({"benchmark": "scale", "rows_per_file": ROWS, "results": results}))


if __name__ == "__main__":
    main()
