"""The preset store: immutable versions, published whole or not at all, by any number of publishers."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets import PresetStore, resolve
from s2s_ray.presets.manifest import Manifest, seal

MakePreset = Callable[[int], Path]
RACES = str(Path(__file__).with_name("races.py"))


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    base = "memory://stores" if request.param == "memory" else request.getfixturevalue("s3_server")
    return f"{base}/{tmp_path.name}"


def test_publish_list_resolve_fetch(url: str, make_preset: MakePreset, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PresetStore(url)
    assert store.list() == {}
    first, second = make_preset(1), make_preset(2)
    assert store.publish(first, "p") == "p@1"
    assert store.publish(first, "p") == "p@1"
    assert store.publish(second, "p") == "p@2"
    assert store.publish(first, "p") == "p@3"
    assert store.publish(second, "q") == "q@1"
    assert store.list() == {"p": [1, 2, 3], "q": [1]}
    digests = [Manifest.of_directory(d).digest for d in (first, second)]
    assert store.resolve("p").digest == store.resolve("p@3").digest == store.resolve("p@1").digest == digests[0]
    directory, digest = store.fetch("p@2")
    assert digest == digests[1]
    assert (directory / "config.json").read_bytes() == (second / "config.json").read_bytes()
    for handle in (f"{url}/p@2", f"{url}/p@{digests[1]}"):
        assert (resolve(handle).directory, resolve(handle).digest) == (directory, digest)
    monkeypatch.setenv("S2S_RAY_STORE", url)
    assert resolve("p@2").directory == directory
    assert resolve("q").digest == digests[1]


def test_versions_are_immutable(url: str, make_preset: MakePreset) -> None:
    store = PresetStore(url)
    first, second = make_preset(1), make_preset(2)
    assert store.publish(first, "p", version=7) == "p@7"
    assert store.publish(first, "p", version=7) == "p@7"  # the same content: a repeated publish
    with pytest.raises(PresetError, match="immutable"):
        store.publish(second, "p", version=7)
    assert store.resolve("p").digest == Manifest.of_directory(first).digest
    assert store.publish(second, "p") == "p@8"


@pytest.mark.parametrize("handle", ["p@2", "nothing", "p@0", "p@x", "../p", "p@1/../../x"])
def test_what_is_not_there_is_named(make_preset: MakePreset, tmp_path: Path, handle: str) -> None:
    store = PresetStore(tmp_path / "store")
    store.publish(make_preset(1), "p")
    with pytest.raises(PresetError):
        store.resolve(handle)


def test_a_tampered_store_is_refused(url: str, make_preset: MakePreset, node_cache: Path) -> None:
    """P18: every file changed, truncated, removed; with the pinned digest also a consistent forgery."""
    store, source = PresetStore(url), make_preset(1)
    pinned = Manifest.of_directory(source).digest
    store.publish(source, "p")
    location = store.resolve("p").location
    for name in [*(p.name for p in source.iterdir()), "manifest.json"]:
        good = (location / name).read_bytes()
        for data in (good + b" ", good[:-1], bytes([good[0] ^ 4]) + good[1:], None):
            (location / name).delete() if data is None else (location / name).write_atomic(data)
            if name == "manifest.json" and data in (None, good + b" "):
                assert store.fetch("p")[1] == pinned  # the content is what it should be
                shutil.rmtree(node_cache)
                continue
            with pytest.raises(PresetIntegrityError):
                store.fetch("p")
        (location / name).write_atomic(good)
    forged = make_preset(2)
    store.publish(forged, "p")
    with pytest.raises(PresetIntegrityError, match=pinned):
        resolve(f"{url}/p@2", expected_digest=pinned)


def test_a_damaged_version_record_is_refused(url: str, make_preset: MakePreset) -> None:
    store = PresetStore(url)
    store.publish(make_preset(1), "p")
    record = store.location / "p/versions/00000001.json"
    for data in (b"", b"{}", b'{"digest": "../../x"}', b'{"digest": 3}', b"[]"):
        record.write_atomic(data)
        with pytest.raises(PresetIntegrityError):
            store.resolve("p@1")


def test_publish_checks_the_preset(tmp_path: Path, make_preset: MakePreset) -> None:
    store = PresetStore(tmp_path / "store")
    nan = make_preset(1)
    save_file({"w": np.array([1.0, np.nan], np.float32)}, nan / "model.safetensors")
    with pytest.raises(PresetIntegrityError, match="finite"):
        store.publish(nan, "p")
    tampered = make_preset(2)
    seal(tampered)
    (tampered / "config.json").write_text("{}")
    with pytest.raises(PresetIntegrityError, match="config"):
        store.publish(tampered, "p")
    pickled = make_preset(3)
    (pickled / "optimizer.pt").write_bytes(b"")
    with pytest.raises(PresetError, match="optimizer"):
        store.publish(pickled, "p")
    with pytest.raises(PresetError, match="config"):
        store.publish(tmp_path, "p")
    good = make_preset(4)
    for name in ("", "../p", "a/b", ".p", "p@1", "é"):
        with pytest.raises(PresetError, match="name"):
            store.publish(good, name)
    assert store.list() == {}


def test_a_crash_at_any_step_publishes_nothing_or_everything(make_preset: MakePreset, tmp_path: Path) -> None:
    arguments = ["crash", str(tmp_path / "store"), str(make_preset(1))]
    subprocess.run([sys.executable, RACES, *arguments], check=True)
    assert PresetStore(tmp_path / "store").list() == {"p": [1]}


def test_races_of_publishers(make_preset: MakePreset, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """P20: eight publishers, two races a round; fifty races with --full."""
    rounds = "25" if pytestconfig.getoption("--full") else "3"
    for seed in range(8):
        make_preset(seed)
    arguments = ["publish", str(tmp_path / "store"), str(tmp_path / "sources"), "p", rounds]
    subprocess.run([sys.executable, RACES, *arguments], check=True)


def test_publishers_race_for_a_version_on_s3(make_preset: MakePreset, s3_server: str, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from s2s_ray.presets.store import PresetStore as S;"
    code += "sys.stdin.read(); S(sys.argv[1]).publish(Path(sys.argv[2]), 'p', version=1)"
    url = f"{s3_server}/{tmp_path.name}"
    sources = [make_preset(seed) for seed in range(4)]
    command = [sys.executable, "-c", code, url]
    racers = [subprocess.Popen([*command, str(d)], stdin=subprocess.PIPE, stderr=subprocess.PIPE) for d in sources]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()
    codes = [racer.wait() for racer in racers]
    assert sorted(codes) == [0, 1, 1, 1]
    winner = sources[codes.index(0)]
    assert PresetStore(url).fetch("p@1")[1] == Manifest.of_directory(winner).digest
