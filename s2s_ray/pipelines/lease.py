"""A lease on an output directory: keeps a second job from doing the same work. Correctness never depends on it."""

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from s2s_ray.errors import InfrastructureError, OwnedElsewhereError
from s2s_ray.pipelines.retries import create, retrying
from s2s_ray.storage import Location, canonical_json, strict_json

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


class Lease:
    """`with Lease(directory) as lease:` holds `owner.json` there and renews it. Raises OwnedElsewhereError.

    A lease is stale, and taken over, when its heartbeat is STALE_SECONDS old, or at once when its process ran on this
    machine and is gone.
    """

    def __init__(self, directory: Location) -> None:
        self.path = directory / "owner.json"
        self.id = uuid.uuid4().hex
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="s2s_ray lease", daemon=True)

    def __enter__(self) -> "Lease":
        if not self._take():
            owner = self._read()
            if owner is not None and not _is_stale(owner):
                age = max(0.0, time.time() - owner["heartbeat"])
                raise OwnedElsewhereError(
                    f"{self.path.parent.parent.url} is being written by process {owner['pid']} on {owner['host']}, "
                    f"heard of {age:.0f} s ago. Wait for it, or stop it and retry after {STALE_SECONDS:.0f} s"
                )
            retrying(lambda: self.path.write_atomic(self._content()))
            self.check()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a lease left behind goes stale by itself
            owner = self._read()
            if owner is not None and owner["id"] == self.id:
                self.path.delete()

    def check(self) -> None:
        """Raises OwnedElsewhereError once another job has taken the lease over."""
        owner = self._read()
        if self.lost or (owner is not None and owner["id"] != self.id):
            self.lost = True
            raise OwnedElsewhereError(
                f"another job took over {self.path.parent.parent.url}; what was committed is kept"
            )

    def _take(self) -> bool:
        content = self._content()
        try:
            return create(self.path, content, content.__eq__)
        except FileNotFoundError:
            return False  # it was there, and was released before it could be read

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self.check()
                self.path.write_atomic(self._content())
            except OwnedElsewhereError:
                return
            except OSError:
                continue  # a missed heartbeat only risks a second job doing the same work

    def _content(self) -> bytes:
        owner = {"id": self.id, "host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}
        return canonical_json(owner | {"heartbeat": time.time()})

    def _read(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = strict_json(retrying(self.path.read_bytes), self.path.url, InfrastructureError)
        except FileNotFoundError:
            return None
        return owner


def _is_stale(owner: dict[str, Any]) -> bool:
    if owner["host"] == _host() and owner["started"] is not None:
        return _started(owner["pid"]) != owner["started"]
    return bool(time.time() - owner["heartbeat"] > STALE_SECONDS)


def _host() -> str:
    """The machine, and where pids are counted per container, the container."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a live process started, in clock ticks since boot (Linux, proc(5) field 22): tells a reused pid apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
