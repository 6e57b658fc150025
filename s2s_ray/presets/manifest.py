"""What a preset consists of, to the byte: names, sizes and SHA-256 sums, and one digest over them.

`manifest.json` is canonical JSON, so the digest is also what `sha256sum manifest.json` prints. A directory without a
manifest (a Hugging Face one) has the digest its manifest would have.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.storage import Location, canonical_json, sha256_bytes, sha256_file, strict_json

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
FILE_SUFFIXES = (".json", ".txt", ".safetensors", ".model", ".spm", ".md")
_FORMAT = {"format": "s2s_ray.preset", "format_version": 1}
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a preset: its name in the directory, bytes, hexadecimal SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a preset, sorted by name."""

    files: tuple[FileEntry, ...]

    @classmethod
    def of_directory(cls, directory: Path) -> "Manifest":
        """Hash the files a preset may read (`FILE_SUFFIXES`, top level, not hidden); others are not part of it.

        Raises PresetIntegrityError for links that lead out of the directory.
        """
        names = sorted(p.name for p in directory.iterdir() if is_preset_file(p.name) and p.is_file())
        refuse_links(directory, names)
        return cls(tuple(FileEntry(n, (directory / n).stat().st_size, sha256_file(directory / n)) for n in names))

    @classmethod
    def parse(cls, data: bytes, what: str) -> "Manifest":
        """Raises PresetIntegrityError unless `data` is a manifest with plain file names, each once."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise PresetIntegrityError(f"{what} must be at most {MAX_MANIFEST_BYTES} bytes")
        value = strict_json(data, what, PresetIntegrityError)
        files = value.get("files") if isinstance(value, dict) else None
        if not isinstance(files, list) or {k: v for k, v in value.items() if k != "files"} != _FORMAT:
            raise PresetIntegrityError(f"{what} must be a preset manifest: {_FORMAT} and a list of files")
        entries = tuple(_entry(item, what) for item in files)
        names = [entry.name for entry in entries]
        if names != sorted(set(names)):
            raise PresetIntegrityError(f"{what} must name each file once, sorted. Received: {names[:20]}")
        return cls(entries)

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """The directory's manifest, None where there is none. Raises PresetIntegrityError for a bad one."""
        path = directory / MANIFEST_FILE
        if not path.exists():
            return None
        return cls.parse(Location.parse(path).read_bytes(MAX_MANIFEST_BYTES + 1), str(path))

    def to_bytes(self) -> bytes:
        files = [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files]
        return canonical_json({**_FORMAT, "files": files})

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the canonical manifest: the identity of the preset."""
        return sha256_bytes(self.to_bytes())

    def verify(self, directory: Path) -> None:
        """Raises PresetIntegrityError unless `directory` holds these files and no others, byte for byte."""
        present = {path.name for path in directory.iterdir()} - {MANIFEST_FILE}
        expected = {entry.name for entry in self.files}
        if present != expected:
            raise PresetIntegrityError(
                f"{directory} must hold what its manifest names. Missing: {sorted(expected - present)}; "
                f"not in the manifest: {sorted(present - expected)}. Fetch or publish the preset again"
            )
        refuse_links(directory, expected)
        for entry in self.files:
            self._verify_file(directory / entry.name, entry)

    @staticmethod
    def _verify_file(path: Path, entry: FileEntry) -> None:
        if not path.is_file():
            raise PresetIntegrityError(f"{path} must be a plain file. Received: a directory")
        size = path.stat().st_size
        if size != entry.size:
            raise PresetIntegrityError(f"{path} must have {entry.size} bytes. Received: {size}")
        received = sha256_file(path)
        if received != entry.sha256:
            raise PresetIntegrityError(f"{path} must have SHA-256 {entry.sha256}. Received: {received}")


def is_digest(value: object) -> bool:
    """Whether this is a hexadecimal SHA-256."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def strangers(directory: Path) -> list[str]:
    """Names in a directory that no preset may hold, sorted."""
    return sorted(p.name for p in directory.iterdir() if not is_preset_file(p.name) and p.name != MANIFEST_FILE)


def is_preset_file(name: str) -> bool:
    """Whether a file of this name belongs to a preset; the manifest itself does not."""
    return bool(_FILE_NAME.fullmatch(name)) and name.endswith(FILE_SUFFIXES) and name != MANIFEST_FILE


def refuse_links(directory: Path, names: Iterable[str]) -> None:
    """Raises PresetIntegrityError if one of these names in `directory` leads out of it.

    Not counted are links as huggingface_hub's cache makes them, from <repository>/snapshots/<revision> into
    <repository>/blobs: a preset that somebody unpacked here must not make us read, and publish, other files.
    """
    allowed = [directory.resolve()]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    for name in names:
        target = (directory / name).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise PresetIntegrityError(
                f"{directory / name} must be a plain file. Received: a link to {target}; copy the file"
            )


def seal(directory: Path) -> Manifest:
    """Write `manifest.json` over the files of a preset directory, which must hold nothing else."""
    if unknown := strangers(directory):
        raise PresetError(
            f"a preset may hold files ending in {', '.join(FILE_SUFFIXES)} and named [A-Za-z0-9._-]. "
            f"Received: {unknown[:10]} in {directory}"
        )
    manifest = Manifest.of_directory(directory)
    Location.parse(directory / MANIFEST_FILE).write_atomic(manifest.to_bytes())
    return manifest


def verified_manifest(directory: Path) -> Manifest:
    """The verified manifest of a directory, or, where it has none, the manifest of what is there."""
    manifest = Manifest.read(directory)
    if manifest is None:
        return Manifest.of_directory(directory)
    manifest.verify(directory)
    return manifest


def _entry(item: Any, what: str) -> FileEntry:
    if isinstance(item, Mapping) and set(item) == {"name", "size", "sha256"}:
        name, size, digest = item["name"], item["size"], item["sha256"]
        good_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if isinstance(name, str) and is_preset_file(name) and good_size and is_digest(digest):
            return FileEntry(name, size, digest)
    raise PresetIntegrityError(f"{what} must list files as name, size, sha256. Received: {str(item)[:200]}")
