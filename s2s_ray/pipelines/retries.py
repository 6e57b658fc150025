"""Storage operations tried a few times, and the one whose result may be unknown read back."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from s2s_ray.storage import Location

ATTEMPTS = 5
BACKOFF_SECONDS = 0.05  # before the second attempt; four times as long before each further one
# Trying again cannot cure these.
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
T = TypeVar("T")


def retrying(operation: Callable[[], T]) -> T:
    """The result of an idempotent storage operation, tried a few times on errors that may pass."""
    for attempt in range(ATTEMPTS):
        try:
            return operation()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if error.errno in _HOPELESS or attempt == ATTEMPTS - 1:
                raise
            time.sleep(BACKOFF_SECONDS * 4**attempt)
    raise AssertionError("unreachable")


def create(path: Location, content: bytes, is_ours: Callable[[bytes], bool]) -> bool:
    """Create `path` exclusively. True if what is there is ours, also when the answer to our request was lost.

    Raises OSError if storage keeps failing; then it is unknown.
    """
    for attempt in range(ATTEMPTS):
        try:
            if path.create_exclusive(content):
                return True
            break
        except OSError as error:
            # Unknown result: the request may have been carried out. Trying again is safe, reading back decides.
            if error.errno in _HOPELESS or attempt == ATTEMPTS - 1:
                raise
            time.sleep(BACKOFF_SECONDS * 4**attempt)
    return is_ours(retrying(path.read_bytes))
