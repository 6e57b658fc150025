"""Durable notes of what was tried, so that rows which kill their worker are found and given up. No torch, no Ray.

Below OUT/_s2s/<fingerprint>/attempts: a note per start, `u00000007.1`, or of some rows alone `u00000007.0-64.1`, and
the answers of rows that got through alone, `u00000007.0-64.answers`. A process that dies says nothing; a start without
an end is all that is left of it, whatever killed it.
"""

import uuid
from dataclasses import dataclass

from s2s_ray.failpoints import failpoint
from s2s_ray.pipelines.ledger import Ledger
from s2s_ray.pipelines.retries import create, retrying
from s2s_ray.storage import Location

STARTS = 3  # of a unit among others, and of a row alone; then it is to blame


@dataclass(frozen=True, slots=True)
class Attempts:
    """The notes on one unit."""

    ledger: Ledger
    unit: int

    def start(self) -> int | None:
        """Note that the unit goes to a worker; the number of this start, None after STARTS of them."""
        failpoint("attempt.before")
        return self._start(self._name(""), STARTS)

    def start_alone(self, first: int, stop: int) -> int | None:
        """Note that rows first to stop - 1 of the unit, and nothing else, go to a worker.

        Many rows get one start: if the worker dies it was one of them, or a kill that hit them by chance, and halves
        will tell. A single row gets STARTS.
        """
        return self._start(self._name(f".{first}-{stop}"), STARTS if stop - first == 1 else 1)

    def keep(self, first: int, stop: int, answers: bytes) -> None:
        """Keep the answers of rows that got through, so that the next crash does not cost them."""
        retrying(lambda: self._location(self._name(f".{first}-{stop}.answers")).write_atomic(answers))

    def kept(self, first: int, stop: int) -> bytes | None:
        """What `keep` was given for these rows."""
        try:
            return retrying(self._location(self._name(f".{first}-{stop}.answers")).read_bytes)
        except FileNotFoundError:
            return None

    def _start(self, name: str, most: int) -> int | None:
        token = uuid.uuid4().hex.encode()
        numbers = range(1, most + 1)
        return next((n for n in numbers if create(self._location(f"{name}.{n}"), token, token.__eq__)), None)

    def _name(self, what: str) -> str:
        return f"u{self.unit:08d}{what}"

    def _location(self, name: str) -> Location:
        return self.ledger.attempts / name
