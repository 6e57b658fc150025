"""Remote presets as local directories, fetched once per node.

A preset is fetched into a directory of its own, checked against its manifest, synced, and renamed to
`<cache>/presets/<digest>`; so that directory is complete or absent, whoever is killed when. The lock saves work when
many processes want the same preset at once; correctness does not depend on it.
"""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from s2s_ray.errors import InfrastructureError, PresetError, PresetIntegrityError, S2SRayError
from s2s_ray.failpoints import failpoint
from s2s_ray.presets.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    Manifest,
    is_preset_file,
)
from s2s_ray.storage import Location, canonical_json, sha256_bytes

CACHE_VARIABLE = "S2S_RAY_CACHE"
LOCK_PATIENCE = 600.0  # seconds; then the holder is taken for hung, and fetching twice for the better evil
_STALE_AFTER = 24 * 3600.0  # seconds after which a temporary directory has lost its owner


def cache_directory() -> Path:
    """S2S_RAY_CACHE, by default ~/.cache/s2s_ray."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/s2s_ray").expanduser().absolute()


def fetch(source: Location, expected_digest: str | None = None) -> tuple[Path, str]:
    """(local directory, digest) of a remote preset directory.

    With `expected_digest` a copy on this node is used without asking the source. Without a manifest at the source the
    key is what the listing says (names, sizes, etags), and the copy gets a manifest of its own.
    Raises PresetError when there is no preset, PresetIntegrityError when it is not what its manifest says.
    """
    if expected_digest is not None and (found := cached(expected_digest)):
        return found, expected_digest
    with _storage_errors(source):
        manifest = _remote_manifest(source)
        if manifest is None:
            directory = _fetch_unsealed(source)
        elif expected_digest in (None, manifest.digest):
            directory = _fetch_sealed(source, manifest)
        else:
            raise PresetIntegrityError(f"{source} must have digest {expected_digest}. Received: {manifest.digest}")
    if expected_digest not in (None, directory.name):
        raise PresetIntegrityError(f"{source} must have digest {expected_digest}. Received: {directory.name}")
    return directory, directory.name


def _fetch_sealed(source: Location, manifest: Manifest) -> Path:
    with _lock(manifest.digest):
        if found := cached(manifest.digest):
            return found
        with temporary_directory() as temporary:
            for entry in manifest.files:
                _download(source, entry.name, temporary)
            return _install(temporary, manifest)


def _fetch_unsealed(source: Location) -> Path:
    names = [name for name in source.list_names() if is_preset_file(name)]
    if "config.json" not in names:
        raise PresetError(f"a preset must hold config.json. Received: {source}, which holds {names[:10]}")
    listing = _listing(source, names)

    def download(directory: Path) -> None:
        for name in names:
            _download(source, name, directory)
        if _listing(source, names) != listing:
            raise InfrastructureError(f"{source} was changed while it was read; try again")

    return made_once(sha256_bytes(canonical_json([source.url, listing])), download)[0]


def made_once(key: str, make: Callable[[Path], None]) -> tuple[Path, str]:
    """(directory, digest) of the preset that `make` writes into an empty directory; once per node for each key.

    `key`, a digest, must say all that the result depends on.
    """
    pointer = Location.parse(cache_directory() / "listings" / key)
    with _lock(key):
        if pointer.exists() and (found := cached(pointer.read_bytes(64).decode())):
            return found, found.name
        with temporary_directory() as temporary:
            make(temporary)
            directory = _install(temporary, Manifest.of_directory(temporary))
        pointer.write_atomic(directory.name.encode())
    return directory, directory.name


def _listing(source: Location, names: list[str]) -> list[list[str]]:
    return [[name, (source / name).identity()] for name in names]


def _remote_manifest(source: Location) -> Manifest | None:
    try:
        data = (source / MANIFEST_FILE).read_bytes(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        return None
    return Manifest.parse(data, (source / MANIFEST_FILE).url)


def _download(source: Location, name: str, directory: Path) -> None:
    failpoint("preset.download")
    try:
        (source / name).download(directory / name)
    except FileNotFoundError as error:
        raise PresetIntegrityError(f"{source} must hold {name}, which its manifest names") from error


def _entry(digest: str) -> Path:
    return cache_directory() / "presets" / digest


def cached(digest: str) -> Path | None:
    """The verified copy on this node. A damaged one is moved out of the way, to be fetched again."""
    entry = _entry(digest)
    if not entry.is_dir():
        return None
    try:
        manifest = Manifest.read(entry)
        if manifest is None or manifest.digest != digest:
            raise PresetIntegrityError(f"{entry} must hold the manifest with digest {digest}")
        manifest.verify(entry)
    except (PresetIntegrityError, FileNotFoundError):
        _discard(entry)
        return None
    return entry


def _discard(entry: Path) -> None:
    grave = _temporary_path()
    grave.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process saw the same damage first
        entry.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def _install(temporary: Path, manifest: Manifest) -> Path:
    """Verify, sync and rename into place; a good copy that another process put there is kept."""
    manifest.verify(temporary)
    Location.parse(temporary / MANIFEST_FILE).write_atomic(manifest.to_bytes())  # also syncs the directory
    entry = _entry(manifest.digest)
    entry.parent.mkdir(parents=True, exist_ok=True)
    failpoint("preset.install")
    try:
        temporary.rename(entry)
    except OSError:
        if cached(manifest.digest) is None:
            raise
    return entry


@contextlib.contextmanager
def _storage_errors(source: Location) -> Iterator[None]:
    """Object store clients raise errors of their own packages; a rerun may cure them."""
    try:
        yield
    except S2SRayError:
        raise
    except PermissionError as error:
        raise PresetError(f"{source} may not be read with the credentials found: {error}") from error
    except Exception as error:
        raise InfrastructureError(f"{source} cannot be fetched: {type(error).__name__}: {error}") from error


def _temporary_path() -> Path:
    return cache_directory() / "tmp" / uuid.uuid4().hex


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A fresh directory, removed unless renamed; what killed processes left behind is removed after a day."""
    temporary = _temporary_path()
    temporary.mkdir(parents=True)
    for other in temporary.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(other, ignore_errors=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(key: str) -> Iterator[None]:
    path = cache_directory() / "locks" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_PATIENCE
    with path.open("w") as stream:  # closing it, or dying, gives the lock back
        while time.monotonic() < deadline:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a filesystem without locks
                break
        yield
