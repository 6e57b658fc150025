"""A preset store: immutable, numbered versions of named presets on a local path or an object store.

    <store>/<name>/objects/<digest>/...         the files and manifest.json of one preset, addressed by its digest
    <store>/<name>/versions/<number>.json       {"digest": ...}, created exclusively: it exists once, whole, for ever

A version is published by the one exclusive create of its record, after all of its files are there. The newest version
is the highest number, so there is no mutable reference that could be torn or rolled back.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.failpoints import failpoint
from s2s_ray.presets.cache import fetch
from s2s_ray.presets.handles import PRESET_NAME
from s2s_ray.presets.manifest import MANIFEST_FILE, Manifest, is_digest, strangers, verified_manifest
from s2s_ray.presets.weights import WeightFiles
from s2s_ray.storage import Location, canonical_json, strict_json

_MAX_RACES = 1000


@dataclass(frozen=True, slots=True)
class StoredPreset:
    """One version in a store. `version` is None when it was named by its digest."""

    name: str
    version: int | None
    digest: str
    location: Location


class PresetStore:
    """The store at a path or URL. Local paths, s3:// and gs:// can be published to (they create exclusively)."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.location = Location.parse(url)

    def publish(self, directory: Path, name: str, *, version: int | None = None) -> str:
        """Upload a preset directory and give it the next version, or `version`. Returns "name@version".

        Publishing again what is the newest version, or what `version` holds, returns that one. Of racing publishers
        each gets a number of its own; of those that ask for one `version` with different content one wins and the
        others get PresetError. Weights must be finite, and the directory must match its manifest if it has one.
        """
        base = self._base(name)
        manifest = self._check(Path(directory))
        if version is None and (newest := self._newest(name)) and self._digest(name, newest) == manifest.digest:
            return f"{name}@{newest}"
        target = base / "objects" / manifest.digest
        for entry in manifest.files:
            (target / entry.name).upload(Path(directory) / entry.name)
        (target / MANIFEST_FILE).write_atomic(manifest.to_bytes())
        failpoint("preset.publish")
        for _ in range(_MAX_RACES):
            number = version if version is not None else self._newest(name) + 1
            record = base / "versions" / f"{number:08d}.json"
            if record.create_exclusive(canonical_json({"digest": manifest.digest})):
                return f"{name}@{number}"
            if version is not None and self._digest(name, version) == manifest.digest:
                return f"{name}@{version}"  # this content has that version: a repeated publish
            if version is not None:
                raise PresetError(f"versions are immutable, and {name}@{version} in {self.location} is another preset")
        raise PresetError(f"{_MAX_RACES} other publishers of {name} in {self.location} were faster; publish again")

    def list(self) -> dict[str, Sequence[int]]:
        """Names in the store and their versions, ascending."""
        versions = {name: self._versions(name) for name in self.location.list_names() if PRESET_NAME.fullmatch(name)}
        return {name: numbers for name, numbers in versions.items() if numbers}

    def resolve(self, handle: str) -> StoredPreset:
        """ "name" (the newest), "name@3", or "name@<digest>". Raises PresetError when there is no such version."""
        name, _, version = handle.partition("@")
        base = self._base(name)
        if is_digest(version):
            return StoredPreset(name, None, version, base / "objects" / version)
        if version and not version.isdecimal():
            raise PresetError(f"a version must be a number or a digest. Received: {handle!r}")
        number = int(version) if version else self._newest(name)
        if number == 0:
            known = ", ".join(self.list()) or "nothing"
            raise PresetError(f"{self.location} holds no preset {name!r}. It holds: {known}")
        digest = self._digest(name, number)
        return StoredPreset(name, number, digest, base / "objects" / digest)

    def fetch(self, handle: str) -> tuple[Path, str]:
        """(local directory, digest) of `resolve(handle)`; from this node's cache where it has it."""
        stored = self.resolve(handle)
        return fetch(stored.location, stored.digest)

    def _base(self, name: str) -> Location:
        if not PRESET_NAME.fullmatch(name):
            raise PresetError(f"a preset's name must match {PRESET_NAME.pattern}. Received: {name!r}")
        return self.location / name

    def _versions(self, name: str) -> Sequence[int]:
        names = (self._base(name) / "versions").list_names()
        stems = (n.removesuffix(".json") for n in names if n.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _newest(self, name: str) -> int:
        return max(self._versions(name), default=0)

    def _digest(self, name: str, number: int) -> str:
        record = self._base(name) / "versions" / f"{number:08d}.json"
        try:
            value = strict_json(record.read_bytes(4096), record.url, PresetIntegrityError)
        except FileNotFoundError:
            known = ", ".join(map(str, self._versions(name))) or "none"
            raise PresetError(f"{self.location} holds no {name}@{number}. Versions there: {known}") from None
        digest = value.get("digest") if isinstance(value, dict) else None
        if not is_digest(digest):
            raise PresetIntegrityError(f"{record} must name a digest. Received: {str(value)[:200]}")
        return str(digest)

    @staticmethod
    def _check(directory: Path) -> Manifest:
        if not (directory / "config.json").is_file():
            raise PresetError(f"a preset directory must hold config.json. Received: {directory}")
        if unknown := strangers(directory):
            raise PresetError(f"a preset to publish must hold no other files. Received: {unknown[:10]} in {directory}")
        manifest = verified_manifest(directory)
        bad = WeightFiles.open(directory).nonfinite()
        if bad:
            raise PresetIntegrityError(f"weights must be finite. NaN or infinity in {len(bad)} tensors: {bad[:5]}")
        return manifest
