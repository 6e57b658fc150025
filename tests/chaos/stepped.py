"""Drivers whose every storage operation waits for a verdict, so that a test chooses who goes next and what fails."""

import errno
import queue
import threading
from collections.abc import Callable
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

OK, FAIL, UNKNOWN, CRASH = "ok", "fail before", "fail after", "crash"


class Crash(BaseException):
    """The end of a process: nothing catches it, and nothing of its process runs afterwards."""


class Store(MemoryFileSystem):
    """A store of its own: fsspec's keeps one for the whole process."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]


class Driver:
    """`action(filesystem)` in a thread that stands still at each storage operation until `step` says how it ends."""

    def __init__(self, store: Store, action: Callable[[Any], object]) -> None:
        self.ended = False
        self.result: object = None
        self.error: BaseException | None = None
        self._dead = False
        self._verdicts: queue.Queue[str] = queue.Queue()
        self._events: queue.Queue[str] = queue.Queue()
        self._one = threading.Lock()
        threading.Thread(target=self._run, args=(action, Gated(store, self)), daemon=True).start()
        self._wait()

    def step(self, verdict: str = OK) -> None:
        """Let the waiting operation happen, fail before it takes effect, or after; or end the process at it."""
        assert not self.ended
        self._verdicts.put(verdict)
        self._wait()

    def finish(self) -> None:
        while not self.ended:
            self.step()

    def gate(self, operation: Callable[[], Any]) -> Any:
        with self._one:
            if not self._dead:
                self._events.put("waits")
                verdict = self._verdicts.get(timeout=60)
                self._dead = verdict == CRASH
            if self._dead:
                raise Crash
            if verdict == FAIL:
                raise OSError(errno.EIO, "failed before it took effect")
            result = operation()
            if verdict == UNKNOWN:
                raise OSError(errno.EIO, "the answer was lost")
            return result

    def _run(self, action: Callable[[Any], object], filesystem: Any) -> None:
        try:
            self.result = action(filesystem)
        except BaseException as error:
            self.error = error
        self._events.put("ended")

    def _wait(self) -> None:
        self.ended = self._events.get(timeout=60) == "ended"


class Gated:
    """The operations that `Location` uses, each through its driver's gate."""

    def __init__(self, store: Store, driver: Driver) -> None:
        self._store, self._driver = store, driver

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return lambda *args, **options: self._driver.gate(lambda: method(*args, **options))
