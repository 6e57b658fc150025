"""P11: flipped bits and cut ends of Parquet files, read in processes of their own, for what may crash does it there."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ledger_run import exit_code, in_child

from s2s_ray import presets
from s2s_ray.errors import InputError
from s2s_ray.pipelines.inputs import find_files, output_schema, read_footers
from s2s_ray.pipelines.plan import cut
from s2s_ray.pipelines.rows import Job, read_unit
from s2s_ray.pipelines.settings import GenerateSettings
from s2s_ray.storage import Location

SEED, ROWS = 20251, 120
pytestmark = pytest.mark.timeout(1800)  # with --full, on a busy machine


@pytest.fixture(scope="module")
def table() -> pa.Table:
    texts = [f"row {row} says {'something longer ' * (row % 7)}" for row in range(ROWS)]
    return pa.table({"id": range(ROWS), "text": texts, "list": [[row, None] for row in range(ROWS)]})


def damaged(original: bytes, number: int, flips: int) -> bytes:
    """Number 0 to flips - 1: one bit flipped; from there on: the end cut off."""
    dice = random.Random(SEED + number)
    if number >= flips:
        return original[: dice.randrange(len(original))]
    content = bytearray(original)
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(content)


def outcome(path: Path, table: pa.Table, digest: str) -> str:
    """What the job makes of the file: refused, or its rows unchanged, unreadable, or changed without a word."""
    output = str(path.parent / "out")
    settings = GenerateSettings(input=(str(path),), output=output, preset="debian_summarizer_en", rows_per_unit=50)
    try:
        footers, _ = read_footers(find_files(settings.input, Location.parse(output)), skip_bad=False)
        schema = output_schema(footers, settings)
    except InputError:
        return "refused before the run"
    job = Job(settings, digest, "f" * 32, schema, "run")
    work = pa.concat_tables([read_unit(unit, job)[0] for unit in cut(footers, 50)]).to_pylist()
    assert [row["row"] for row in work] == list(range(len(work)))
    good = [hashlib.sha256(text.encode()).hexdigest() for text in table.column("text").to_pylist()]
    if len(work) != ROWS or any(row["reason"] is None and row["input_sha256"] != good[row["row"]] for row in work):
        return "changed without a word"
    return "error rows" if any(row["reason"] for row in work) else "unchanged"


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_is_refused_or_becomes_error_rows(
    tmp_path: Path, table: pa.Table, pytestconfig: pytest.Config, checksums: bool, record: Callable[..., None]
) -> None:
    flips, cuts = (500, 50) if pytestconfig.getoption("--full") else (40, 8)
    pq.write_table(table, tmp_path / "good.parquet", row_group_size=40, write_page_checksum=checksums)
    original = (tmp_path / "good.parquet").read_bytes()
    path, log = tmp_path / "in.parquet", tmp_path / "log"

    def read_all() -> None:
        digest = presets.resolve("debian_summarizer_en").digest
        with log.open("a") as lines:
            for number in range(flips + cuts):
                path.write_bytes(damaged(original, number, flips))
                os.utime(path, ns=(number, number))
                print(json.dumps([number, outcome(path, table, digest)]), file=lines, flush=True)

    child = exit_code(in_child(read_all))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert child == 0, f"seed {SEED}, case {len(lines)}: the process ended with {child}"
    found = Counter(what for _, what in lines)
    print(f"seed {SEED}", dict(found))
    changed = found["changed without a word"]
    kind = "with page checksums" if checksums else "without page checksums, of which some change text unnoticed"
    record(f"damaged Parquet {kind}", injected=len(lines), rows=len(lines) * ROWS, lost=0, doubled=0)
    assert len(lines) == flips + cuts and found["refused before the run"] > cuts / 2 and found["error rows"]
    assert not (checksums and changed), "page checksums tell, and must be looked at"
