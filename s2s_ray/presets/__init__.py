"""Presets: from a handle to a verified local directory."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets import cache, handles, huggingface, kaggle, keras
from s2s_ray.presets.handles import Handle, HandleKind
from s2s_ray.presets.manifest import verified_manifest
from s2s_ray.presets.public import PUBLIC
from s2s_ray.presets.store import PresetStore
from s2s_ray.storage import Location

__all__ = [
    "DEFAULT_SUMMARIZER",
    "DEFAULT_TRANSLATOR",
    "PresetStore",
    "ResolvedPreset",
    "absolute",
    "builtin_names",
    "resolve",
]

DEFAULT_SUMMARIZER = "debian_summarizer_en"
DEFAULT_TRANSLATOR = "debian_translator_en"
BUILTIN_DIRECTORY = Path(__file__).parent / "builtin"


@dataclass(frozen=True, slots=True)
class ResolvedPreset:
    """A preset on this machine. `digest` identifies its content (see manifest.py); `handle` is what was asked for."""

    directory: Path
    digest: str
    handle: str


def builtin_names() -> dict[str, dict[str, Any]]:
    """Name to metadata: `description`, and `handle` where it is fetched from or `directory` where it ships with us."""
    shipped = {
        path.name: {"description": _description(path), "directory": str(path)}
        for path in sorted(BUILTIN_DIRECTORY.iterdir() if BUILTIN_DIRECTORY.is_dir() else ())
        if (path / "config.json").is_file()
    }
    return {**shipped, **{name: dict(metadata) for name, metadata in PUBLIC.items()}}


def absolute(handle: str) -> str:
    """The handle as it means the same in every working directory: a local directory by its full path."""
    if "://" in handle or handle in builtin_names() or not Path(handle).expanduser().is_dir():
        return handle
    return str(Path(handle).expanduser().absolute())


def resolve(handle: str | os.PathLike[str], *, expected_digest: str | None = None) -> ResolvedPreset:
    """A local directory, verified against its manifest if it has one. Handles: see handles.py.

    Every call reads and hashes all files of the preset; call it once per process. With `expected_digest` anything else
    raises PresetIntegrityError. A KerasHub directory is converted into the node's cache. Raises PresetError for what
    names no preset, UnsupportedModelError for what cannot be converted.
    """
    parsed = handles.parse(handle)
    directory, digest = _locate(parsed, expected_digest)
    if expected_digest is not None and digest != expected_digest:
        raise PresetIntegrityError(f"preset {parsed} must have digest {expected_digest}. Received: {digest}")
    return ResolvedPreset(directory, digest, str(handle))


def _locate(handle: Handle, expected_digest: str | None) -> tuple[Path, str]:
    match handle.kind:
        case HandleKind.NAME:
            return _locate_name(handle.target, expected_digest)
        case HandleKind.HUGGINGFACE:
            return _local(huggingface.download(handle.target, handle.version))
        case HandleKind.KAGGLE:
            return _local(kaggle.download(handle.target))
        case HandleKind.STORE:
            version = f"@{handle.version}" if handle.version else ""
            return PresetStore(handle.store or "").fetch(handle.target + version)
    location = Location.parse(handle.target)
    if location.is_local:
        return _local(Path(location.path))
    if expected_digest is not None and (found := cache.cached(expected_digest)):
        return found, expected_digest
    return keras.resolve(location) if keras.is_keras(location) else cache.fetch(location, expected_digest)


def _locate_name(name: str, expected_digest: str | None) -> tuple[Path, str]:
    """Built-in first as in KerasHub, then a directory of that name, then the store."""
    known = builtin_names()
    if name in known:
        metadata = known[name]
        if "directory" in metadata:
            return _local(Path(metadata["directory"]))
        return _locate(handles.parse(metadata["handle"]), expected_digest)
    if Path(name).is_dir():
        return _local(Path(name).absolute())
    if store := os.environ.get(handles.STORE_VARIABLE):
        return PresetStore(store).fetch(name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise PresetError(
        f"no preset or directory is called {name!r}.{hint} Built-in names: {', '.join(sorted(known))}. "
        "Otherwise give a directory, hf://org/name, a URL, or set S2S_RAY_STORE"
    )


def _local(directory: Path) -> tuple[Path, str]:
    if not (directory / "config.json").is_file():
        what = "a directory without config.json" if directory.is_dir() else "no directory"
        raise PresetError(f"a preset must be a directory that holds config.json. Received: {directory}, {what}")
    location = Location.parse(directory)
    if keras.is_keras(location):
        return keras.resolve(location)
    return directory, verified_manifest(directory).digest


def _description(directory: Path) -> str:
    """The first line of prose in the preset's README.md."""
    readme = directory / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return next((line for line in lines if line and line[0].isalnum()), "")
