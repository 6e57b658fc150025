"""The node cache: many processes, some killed, a damaged copy, a source that changes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from s2s_ray.errors import InfrastructureError, PresetError, PresetIntegrityError
from s2s_ray.presets import cache, resolve
from s2s_ray.presets.manifest import Manifest, seal
from s2s_ray.storage import Location

MakePreset = Callable[[int], Path]


def put(source: Path, url: str) -> Location:
    target = Location.parse(url)
    for path in source.iterdir():
        (target / path.name).upload(path) if target.is_local else (target / path.name).write_atomic(path.read_bytes())
    return target


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty remote directory's URL."""
    base = "memory://cache" if request.param == "memory" else request.getfixturevalue("s3_server")
    return f"{base}/{tmp_path.name}"


def test_fetch_once_then_from_the_cache(remote: str, make_preset: MakePreset, node_cache: Path) -> None:
    source = make_preset(1)
    manifest = seal(source)
    location = put(source, remote)
    directory, digest = cache.fetch(location)
    assert (directory, digest) == (node_cache / "presets" / manifest.digest, manifest.digest)
    manifest.verify(directory)
    location.delete(recursive=True)
    assert cache.fetch(location, digest) == (directory, digest)
    with pytest.raises(PresetError):
        cache.fetch(location)


def test_a_preset_without_manifest(remote: str, make_preset: MakePreset) -> None:
    source = make_preset(2)
    location = put(source, remote)
    expected = Manifest.of_directory(source)
    first = cache.fetch(location)
    assert first[1] == expected.digest
    expected.verify(first[0])
    assert cache.fetch(location) == first
    (location / "config.json").write_atomic(b'{"changed": true}')
    second = cache.fetch(location)
    assert second[1] != first[1]
    assert cache.fetch(location, first[1]) == first  # pinned, and still on this node
    shutil.rmtree(first[0])
    with pytest.raises(PresetIntegrityError, match=first[1]):
        cache.fetch(location, first[1])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_source_that_is_not_its_manifest_is_refused(
    remote: str, make_preset: MakePreset, node_cache: Path, name: str
) -> None:
    source = make_preset(3)
    digest = seal(source).digest
    location = put(source, remote)
    good = (source / name).read_bytes()
    for data in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), None):
        (location / name).delete() if data is None else (location / name).write_atomic(data)
        with pytest.raises(PresetIntegrityError):
            cache.fetch(location)
        assert not (node_cache / "presets" / digest).exists()
        assert list((node_cache / "tmp").iterdir()) == []


def test_a_tampered_manifest_is_refused_by_the_pinned_digest(remote: str, make_preset: MakePreset) -> None:
    source = make_preset(4)
    digest = seal(source).digest
    (source / "config.json").write_text('{"tampered": 1}')
    seal(source)
    with pytest.raises(PresetIntegrityError, match=digest):
        resolve(put(source, remote).url, expected_digest=digest)


def test_a_damaged_copy_is_replaced(remote: str, make_preset: MakePreset) -> None:
    source = make_preset(5)
    manifest = seal(source)
    location = put(source, remote)
    directory, _ = cache.fetch(location)
    (directory / "config.json").write_text("{}")
    assert cache.fetch(location)[0] == directory
    manifest.verify(directory)
    (directory / "model.safetensors").unlink()
    cache.fetch(location)
    manifest.verify(directory)


def test_an_unreachable_source_is_retryable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InfrastructureError, match="cannot be fetched"):
        cache.fetch(Location.parse("s3://no-such-bucket/p"))
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_killed_fetch_leaves_no_preset_and_its_leavings_go_after_a_day(
    make_preset: MakePreset, node_cache: Path
) -> None:
    source = make_preset(6)
    digest = seal(source).digest
    for failpoint in ("preset.download:3", "preset.install:1", "read.before:4", "write.before:1", "write.after:1"):
        environment = os.environ | {"S2S_RAY_FAILPOINT": f"{failpoint}:exit"}
        code = "import sys; from s2s_ray.presets import cache; from s2s_ray.storage import Location as L;"
        code += "cache.fetch(L.parse(sys.argv[1]))"
        process = subprocess.run([sys.executable, "-c", code, str(source)], env=environment)
        assert process.returncode == 86, failpoint
        assert not (node_cache / "presets" / digest).exists()
    leavings = list((node_cache / "tmp").iterdir())
    assert len(leavings) == 5
    for path in leavings[:4]:
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    assert cache.fetch(Location.parse(source))[1] == digest
    assert list((node_cache / "tmp").iterdir()) == leavings[4:]


@pytest.mark.parametrize("lock", ["locked", "unlocked"])
def test_many_processes_fetch_while_some_are_killed(
    make_preset: MakePreset, tmp_path: Path, lock: str, pytestconfig: pytest.Config
) -> None:
    """P19: 32 processes, 30% killed, x20 with --full (x6 without); half of the trials with the lock made a no-op."""
    trials = "10" if pytestconfig.getoption("--full") else "3"
    source = make_preset(7)
    digest = seal(source).digest
    script = str(Path(__file__).with_name("races.py"))
    subprocess.run([sys.executable, script, "fetch", str(source), str(tmp_path), digest, trials, lock], check=True)
