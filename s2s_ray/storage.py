"""Files on any fsspec filesystem behind one small class, with the few operations that correctness rests on.

Two of them are atomic and durable: `write_atomic` (a reader sees the old bytes or the new) and `create_exclusive`
(of any number of racing writers exactly one wins). Every operation passes a failpoint, so tests can crash at each one.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from s2s_ray.errors import InfrastructureError, InputError, S2SRayError
from s2s_ray.failpoints import failpoint
from s2s_ray.jsonio import canonical_json, strict_json

__all__ = ["Location", "canonical_json", "sha256_bytes", "sha256_file", "strict_json"]

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_PROTOCOLS = {"file", "memory", *_EXTRAS, "az", "abfs", "abfss", "hdfs", "webhdfs", "hf", "http", "https"}
# Here pipe_file(mode="create") is one conditional request (If-None-Match, ifGenerationMatch=0), or in memory.
_EXCLUSIVE = {"memory", "s3", "s3a", "gs", "gcs"}
_CHUNK = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Location:
    """A file or directory: an fsspec filesystem and a path on it. Pickles as its URL, so no credentials travel."""

    path: str
    protocol: str = "file"
    fs: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, url: "str | os.PathLike[str] | Location") -> "Location":
        """A plain path, or scheme://path. Raises InputError for chains (::), userinfo, queries and unknown schemes."""
        if isinstance(url, Location):
            return url
        text = os.fspath(url)
        if not isinstance(text, str) or not text or "\0" in text:
            raise InputError(f"a location must be a path or URL. Received: {text!r}")
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(_absolute(text), "file", LocalFileSystem())
        _check_url(text, scheme, rest)
        if scheme == "file":
            return cls(_absolute(rest), "file", LocalFileSystem())
        return cls(_strip(scheme, rest), scheme, _filesystem(scheme))

    def __reduce__(self) -> tuple[Any, ...]:
        return Location.parse, (self.url,)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, part: str) -> "Location":
        if part.startswith("/") or ".." in part.split("/"):
            raise InputError(f"a part of a path must be relative and without '..'. Received: {part!r}")
        return self._at(f"{self.path.rstrip('/')}/{part}")

    def _at(self, path: str) -> "Location":
        return Location(path, self.protocol, self.fs)

    @property
    def url(self) -> str:
        """The full URL; a plain absolute path for a local file."""
        if self.is_local:
            return self.path
        return f"{self.protocol}://{self.path.lstrip('/')}"

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Location":
        return self._at(self.path.rstrip("/").rsplit("/", 1)[0] or "/")

    def exists(self) -> bool:
        failpoint("stat.before")
        with _as_oserror():
            return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        failpoint("stat.before")
        with _as_oserror():
            return bool(self.fs.isdir(self.path))

    def size(self) -> int:
        """Bytes. Raises FileNotFoundError."""
        failpoint("stat.before")
        with _as_oserror():
            return int(self.fs.info(self.path)["size"])

    def identity(self) -> str:
        """Size with etag or modification time: changes whenever the content does, without reading it."""
        failpoint("stat.before")
        if self.is_local:
            stat = Path(self.path).stat()
            return f"{stat.st_size}-{stat.st_mtime_ns}"
        with _as_oserror():
            return _identity(self.fs.info(self.path))

    def read_bytes(self, limit: int | None = None) -> bytes:
        """The whole file, or its first `limit` bytes."""
        failpoint("read.before")
        with _as_oserror():
            if limit is None:
                # Otherwise s3fs asks for the size first, to read large files in parallel: two requests for each record.
                options = {"max_concurrency": 1} if self.protocol in ("s3", "s3a") else {}
                return bytes(self.fs.cat_file(self.path, **options))
            with self.open("rb") as stream:
                return bytes(stream.read(limit))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """A file object, seekable for "rb". For writing prefer `write_atomic`."""
        failpoint("open.before")
        with _as_oserror():
            stream: IO[bytes] = self.fs.open(self.path, mode)
            return stream

    def glob(self) -> "list[Location]":
        """What this location matches when its path is read as a pattern (*, ?, [..], **), sorted."""
        with _as_oserror():
            return [self._at(path) for path in sorted(self.fs.glob(self.path))]

    def list_files(self, suffix: str = "") -> "list[Location]":
        """All files below, sorted by path; skips every name below here that starts with "_" or "."."""
        return [location for location, _ in self.list_identities(suffix)]

    def list_identities(self, suffix: str = "") -> "list[tuple[Location, str | None]]":
        """As `list_files`, with each file's `identity` where the listing tells it: on an object store."""
        failpoint("list.before")
        base = self.path.rstrip("/")
        with _as_oserror():
            found: dict[str, Any] = self.fs.find(self.path, detail=True)
        paths = sorted(p for p in found if p.endswith(suffix) and p.rstrip("/") != base)
        listed = [p for p in paths if not _hidden(p[len(base) :])]
        return [(self._at(p), None if self.is_local else _identity(found[p])) for p in listed]

    def list_names(self) -> list[str]:
        """Names one level below, sorted; [] where there is no such directory."""
        failpoint("list.before")
        try:
            with _as_oserror():
                paths = self.fs.ls(self.path, detail=False)
        except FileNotFoundError:
            return []
        names = {p.rstrip("/").rsplit("/", 1)[-1] for p in paths if p.rstrip("/") != self.path.rstrip("/")}
        return sorted(names)

    def write_atomic(self, data: bytes) -> None:
        """Local: temporary file, fsync, rename, fsync of the directory. Object store: one PUT."""
        failpoint("write.before")
        if self.is_local:
            _replace_durably(self._temporary(data), Path(self.path))
        else:
            with _as_oserror():
                self.fs.pipe_file(self.path, data)
        failpoint("write.after")

    def create_exclusive(self, data: bytes) -> bool:
        """True: this call created the file. False: it was there. Any exception leaves that unknown: read it back."""
        failpoint("create.before")
        created = self._link_exclusive(data) if self.is_local else self._put_exclusive(data)
        failpoint("create.after")
        return created

    def upload(self, local_file: Path) -> None:
        """Copy a local file here, atomically."""
        if self.is_local:
            failpoint("write.before")
            temporary = self._temporary_path()
            shutil.copyfile(local_file, temporary)
            fsync(temporary)
            _replace_durably(temporary, Path(self.path))
        else:
            failpoint("write.before")
            with _as_oserror():
                self.fs.put_file(str(local_file), self.path)
        failpoint("write.after")

    def download(self, local_file: Path) -> None:
        """Copy this file to a local path (not atomic: the caller names a temporary one) and fsync it."""
        failpoint("read.before")
        with _as_oserror():
            self.fs.get_file(self.path, str(local_file))
        fsync(local_file)

    def copy_to(self, other: "Location") -> None:
        """Copy this file; on one object store by a server-side copy, locally as an atomic write."""
        if self.is_local:
            other.upload(Path(self.path))
        elif self.protocol == other.protocol:
            failpoint("copy.before")
            with _as_oserror():
                self.fs.cp_file(self.path, other.path)
            failpoint("copy.after")
        else:
            other.write_atomic(self.read_bytes())

    def link_to(self, other: "Location") -> None:
        """Local only: make `other` a second name of this file, replacing what is there; a copy if links are refused."""
        failpoint("link.before")
        temporary = other._temporary_path()
        try:
            os.link(self.path, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK):
                raise
            shutil.copyfile(self.path, temporary)
            fsync(temporary)
        _replace_durably(temporary, Path(other.path))
        failpoint("link.after")

    def delete(self, recursive: bool = False) -> None:
        """Remove the file, or with `recursive` the tree. Nothing there is no error."""
        failpoint("delete.before")
        with contextlib.suppress(FileNotFoundError), _as_oserror():
            self.fs.rm(self.path, recursive=recursive)
        failpoint("delete.after")

    def make_directory(self) -> None:
        """Create the directory and its parents where the filesystem has directories."""
        if self.is_local:
            Path(self.path).mkdir(parents=True, exist_ok=True)

    def filesystem_for_arrow(self) -> tuple[Any, str]:
        """(pyarrow.fs.FileSystem, path), for `pyarrow.parquet` and `pyarrow.dataset`."""
        import pyarrow.fs as pafs

        if self.is_local:
            return pafs.LocalFileSystem(), self.path
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.fs)), self.path

    def _temporary_path(self) -> Path:
        target = Path(self.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"

    def _temporary(self, data: bytes) -> Path:
        temporary = self._temporary_path()
        try:
            with temporary.open("xb") as stream:
                stream.write(data)
            fsync(temporary)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk half a file would keep it full
            raise
        return temporary

    def _link_exclusive(self, data: bytes) -> bool:
        temporary = self._temporary(data)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync(temporary.parent)
        return True

    def _put_exclusive(self, data: bytes) -> bool:
        if self.protocol not in _EXCLUSIVE:
            raise InfrastructureError(
                f"an output must be on a local path, s3:// or gs:// (exclusive create). Received: {self.url}"
            )
        try:
            with _as_oserror():
                self.fs.pipe_file(self.path, data, mode="create")
        except FileExistsError:
            return False
        return True


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: "str | os.PathLike[str] | Location") -> str:
    """Hexadecimal SHA-256 of a file on any filesystem, read in chunks."""
    digest = hashlib.sha256()
    with Location.parse(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_url(text: str, scheme: str, rest: str) -> None:
    authority = rest.split("/", 1)[0]
    problem = (
        "'::' chains are refused"
        if "::" in text
        else "credentials in a URL are refused: use the environment or a role"
        if "@" in authority and scheme != "hf"
        else "query strings are refused"
        if "?" in rest
        else "'..' is refused"
        if ".." in rest.split("/")
        else "file:// needs an absolute path"
        if scheme == "file" and not rest.startswith("/")
        else "a bucket or path must follow"
        if not rest.strip("/")
        else ""
        if scheme in _PROTOCOLS
        else f"unknown scheme; known: {', '.join(sorted(_PROTOCOLS))}"
    )
    if problem:
        shown = f"{scheme}://..." if "@" in authority else text
        raise InputError(f"not a usable location: {problem}. Received: {shown}")


def _filesystem(scheme: str) -> Any:
    try:
        # Other processes write the same directories, so a cached listing would be a wrong one.
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        advice = f"pip install 's2s_ray[{extra}]'" if extra else str(error)
        raise InputError(f"{scheme}:// needs a package that is not installed: {advice}") from error


def _identity(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key) is not None:
            return f"{info['size']}-{str(info[key]).strip(chr(34))}"
    return str(info["size"])


def _strip(scheme: str, rest: str) -> str:
    path = rest.rstrip("/")
    if scheme == "memory":
        return f"/{path.lstrip('/')}"
    return f"{scheme}://{path}" if scheme in ("http", "https") else path


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """Object-store clients raise types of their own; callers of this module see OSError for all of them."""
    try:
        yield
    except (OSError, S2SRayError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - resolve() would follow links


def _hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/") if part)


def _replace_durably(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Make a local file's content, or a directory's entries, survive a crash."""
    failpoint("fsync.before")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
