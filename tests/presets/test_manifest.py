"""Manifests: whatever is changed in a sealed directory is found."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets.manifest import MANIFEST_FILE, FileEntry, Manifest, seal, verified_manifest


@pytest.fixture
def sealed(tiny_bart_dir: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(tiny_bart_dir, tmp_path / "sealed"))
    seal(directory)
    return directory


def test_the_digest_is_the_sum_of_the_manifest_file(sealed: Path, tiny_bart_dir: Path) -> None:
    digest = verified_manifest(sealed).digest
    assert digest == hashlib.sha256((sealed / MANIFEST_FILE).read_bytes()).hexdigest()
    assert digest == verified_manifest(tiny_bart_dir).digest  # the same files without a manifest
    assert seal(sealed).digest == digest


def test_every_change_to_every_file_is_found(sealed: Path) -> None:
    manifest = Manifest.read(sealed)
    assert manifest is not None
    for entry in manifest.files:
        path = sealed / entry.name
        good = path.read_bytes()
        changes = [good[:-1], good + b"\0", bytes([good[0] ^ 1]) + good[1:], good[:-1] + bytes([good[-1] ^ 128]), b""]
        for changed in changes:
            path.write_bytes(changed)
            with pytest.raises(PresetIntegrityError, match=entry.name):
                manifest.verify(sealed)
        path.unlink()
        with pytest.raises(PresetIntegrityError, match="Missing"):
            manifest.verify(sealed)
        path.write_bytes(good)
    manifest.verify(sealed)


@pytest.mark.parametrize("name", ["extra.json", ".hidden", "extra.bin", "model.safetensors.index.json"])
def test_an_added_file_is_found(sealed: Path, name: str) -> None:
    (sealed / name).write_text("{}")
    with pytest.raises(PresetIntegrityError, match="not in the manifest"):
        verified_manifest(sealed)


def test_an_added_directory_and_a_link_are_found(sealed: Path, tmp_path: Path) -> None:
    (sealed / "sub").mkdir()
    with pytest.raises(PresetIntegrityError, match="sub"):
        verified_manifest(sealed)
    (sealed / "sub").rmdir()
    outside = (sealed / "config.json").rename(tmp_path / "outside.json")
    (sealed / "config.json").symlink_to(outside)
    with pytest.raises(PresetIntegrityError, match="plain file"):
        verified_manifest(sealed)
    (sealed / MANIFEST_FILE).unlink()
    with pytest.raises(PresetIntegrityError, match="plain file"):
        verified_manifest(sealed)


def test_links_as_in_the_hubs_cache_are_followed(sealed: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    digest = seal(sealed).digest
    sealed.rename(snapshot)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (snapshot / "config.json").rename(blobs / "abcd")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    assert verified_manifest(snapshot).digest == digest
    (blobs / "abcd").rename(tmp_path / "models--org--name" / "elsewhere")
    (blobs / "abcd").symlink_to("../elsewhere")
    with pytest.raises(PresetIntegrityError, match="a link to"):
        verified_manifest(snapshot)


GOOD = FileEntry("config.json", 2, "0" * 64)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x.json", "a/b.json", "/etc/passwd.json", "a\\b.json", "a\0.json", "é.json", ".x.json"),
        *("x" * 200 + ".json", "x.bin", "x.py", "x.pkl", "manifest.json", "x.json\n", " x.json"),
    ],
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(PresetIntegrityError):
        Manifest.parse(Manifest((FileEntry(name, 2, "0" * 64),)).to_bytes(), "test")


def test_other_faults_of_a_manifest_are_refused() -> None:
    value = json.loads(Manifest((GOOD,)).to_bytes())
    entry = value["files"][0]
    assert Manifest.parse(json.dumps(value).encode(), "test").files == (GOOD,)
    faults: list[object] = [
        [],
        None,
        value | {"format_version": 2},
        value | {"files": None},
        value | {"extra": 1},
        value | {"files": [entry, entry]},
        value | {"files": [entry | {"size": -1}]},
        value | {"files": [entry | {"size": True}]},
        value | {"files": [entry | {"size": 2.0}]},
        value | {"files": [entry | {"sha256": "0" * 63}]},
        value | {"files": [entry | {"sha256": "G" * 64}]},
        value | {"files": [entry | {"more": 1}]},
        value | {"files": ["config.json"]},
        value | {"files": [entry | {"name": "z.json"}, entry]},
    ]
    for fault in faults:
        with pytest.raises(PresetIntegrityError):
            Manifest.parse(json.dumps(fault).encode(), "test")
    for data in (b"", b"{", b'{"files":[],"files":[]}', b"\xff", b" " * (2**20 + 1)):
        with pytest.raises(PresetIntegrityError):
            Manifest.parse(data, "test")


def test_a_directory_with_other_files_is_not_sealed(sealed: Path) -> None:
    (sealed / "optimizer.pt").write_bytes(b"")
    with pytest.raises(PresetError, match=r"optimizer\.pt"):
        seal(sealed)
