"""Locations on a local disk, in memory, and on a moto S3 server: the same promises on each."""

import os
import pickle
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from s2s_ray.errors import InputError, PresetError
from s2s_ray.storage import Location, canonical_json, sha256_bytes, sha256_file, strict_json


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return Location.parse(tmp_path / "root")
    if request.param == "memory":
        return Location.parse(f"memory://{uuid.uuid4().hex}/root")
    return Location.parse(request.getfixturevalue("s3_server")) / f"storage-{uuid.uuid4().hex}"


def test_read_write_list(root: Location) -> None:
    (root / "a" / "x.parquet").write_atomic(b"one")
    (root / "a" / "b" / "y.parquet").write_atomic(b"four")
    (root / "a" / "_hidden" / "z.parquet").write_atomic(b"")
    (root / "a" / ".tmp.parquet").write_atomic(b"")
    (root / "a" / "notes.txt").write_atomic(b"")
    files = (root / "a").list_files(".parquet")
    assert [f.url for f in files] == [(root / "a/b/y.parquet").url, (root / "a/x.parquet").url]
    assert (root / "a").list_names() == [".tmp.parquet", "_hidden", "b", "notes.txt", "x.parquet"]
    assert (root / "nothing").list_names() == []
    assert [f.name for f in (root / "a/*.parquet").glob() if not f.name.startswith(".")] == ["x.parquet"]
    assert files[1].read_bytes() == b"one" and files[1].read_bytes(limit=2) == b"on" and files[1].size() == 3
    assert sha256_file(files[1]) == sha256_bytes(b"one")
    with files[0].open() as stream:
        stream.seek(1)
        assert stream.read(2) == b"ou"


def test_identity_follows_the_content(root: Location) -> None:
    (root / "f").write_atomic(b"one")
    before = (root / "f").identity()
    assert (root / "f").identity() == before
    (root / "f").write_atomic(b"two")
    assert (root / "f").identity() != before


def test_create_exclusive_has_one_winner(root: Location) -> None:
    root.make_directory()
    wins: list[int] = []
    start = threading.Barrier(6)

    def race(who: int) -> None:
        start.wait()
        if (root / "record.json").create_exclusive(b"%d" % who):
            wins.append(who)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (root / "record.json").read_bytes() == b"%d" % wins[0]
    assert root.list_names() == ["record.json"]


def test_upload_download_copy_delete(root: Location, tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"payload")
    (root / "up").upload(source)
    (root / "up").copy_to(root / "copied")
    (root / "copied").download(tmp_path / "down.bin")
    assert (tmp_path / "down.bin").read_bytes() == b"payload"
    (root / "up").delete()
    (root / "up").delete()
    assert not (root / "up").exists() and (root / "copied").exists()
    root.delete(recursive=True)
    assert root.list_names() == []


def test_arrow_reads_what_was_written(root: Location) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1, 2, 3]}), sink)
    (root / "t.parquet").write_atomic(sink.getvalue().to_pybytes())
    filesystem, path = (root / "t.parquet").filesystem_for_arrow()
    assert pq.read_table(path, filesystem=filesystem).column("n").to_pylist() == [1, 2, 3]


def test_urls_round_trip(root: Location) -> None:
    for location in (root, root / "x", root / "x/y"):
        assert Location.parse(location.url) == location
        assert pickle.loads(pickle.dumps(location)) == location
        assert location.fs is not None and "fs" not in repr(location)
    assert (root / "x/y").name == "y" and (root / "x/y").parent == root / "x"


def test_local_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.parse("data/x").url == str(tmp_path / "data/x")
    assert Location.parse(tmp_path).is_local and Location.parse(f"file://{tmp_path}").url == str(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    Location.parse(first).link_to(Location.parse(second))
    assert second.read_bytes() == b"1" and second.stat().st_ino == first.stat().st_ino


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::s3://bucket/x",
        "s3://key:secret@bucket/x",
        "s3://bucket/x?versionId=1",
        "s3://bucket/../x",
        "s3://",
        "file://relative",
        "carrier-pigeon://x",
        "zip://x",
        "",
    ],
)
def test_refused_urls(url: str) -> None:
    with pytest.raises(InputError) as caught:
        Location.parse(url)
    assert "secret" not in str(caught.value)


def test_parts_stay_below(tmp_path: Path) -> None:
    for part in ("/etc", "../x", "a/../../x"):
        with pytest.raises(InputError):
            Location.parse(tmp_path) / part


@pytest.mark.parametrize("action,code", [("exit", 86), ("eio", 1), ("enospc", 1)])
@pytest.mark.parametrize("name", ["write.before", "write.after"])
def test_failpoints(tmp_path: Path, name: str, action: str, code: int) -> None:
    program = (
        "from s2s_ray.storage import Location\n"
        f"for n in range(3): (Location.parse({str(tmp_path)!r}) / f'f{{n}}').write_atomic(b'x')"
    )
    environment = {**os.environ, "S2S_RAY_FAILPOINT": f"{name}:2:{action}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert done.returncode == code
    written = 1 if name == "write.before" else 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"f{n}" for n in range(written)]


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 2}',
        b"[NaN]",
        b"[Infinity]",
        b"[1e999]",
        b"\xff",
        b"{",
        b"",
        b"[" * 100 + b"]" * 100,
        b"[" * 100_000 + b"]" * 100_000,
        b"1" * 10_000,
    ],
)
def test_strict_json_refuses(data: bytes) -> None:
    with pytest.raises(PresetError, match=r"config\.json"):
        strict_json(data, "config.json", PresetError)


def test_strict_json_accepts() -> None:
    assert strict_json(b'{"a": [1, 2.5, null, true, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, True, "é"]}
