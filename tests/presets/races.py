"""Many real processes on one cache or one store, some of them killed.

Run as a script, as forking needs a process without threads:

races.py fetch SOURCE CACHE_ROOT DIGEST TRIALS LOCKED    32 processes a trial fetch one preset, 30% are killed
races.py crash STORE SOURCE                              a publisher dies at every step in turn
races.py publish STORE SOURCES NAME ROUNDS               8 processes publish their own preset, at once, every round
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from s2s_ray.errors import PresetError
from s2s_ray.failpoints import FAILPOINT_EXIT_CODE
from s2s_ray.presets import cache
from s2s_ray.presets.manifest import Manifest
from s2s_ray.presets.store import PresetStore
from s2s_ray.storage import Location, sha256_bytes

SEED = 11


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pids: list[int], killed: set[int]) -> None:
    for pid in pids:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0 or (code == -signal.SIGKILL and pid in killed), (code, SEED)


def fetch_and_check(source: Path, digest: str) -> None:
    directory, found = cache.fetch(Location.parse(source))
    manifest = Manifest.read(directory)
    assert manifest is not None and manifest.digest == found == digest
    manifest.verify(directory)


def fetch_race(source: Path, root: Path, digest: str, trials: int, locked: bool) -> None:
    rng = random.Random(SEED)
    if not locked:
        cache._lock = lambda key: nullcontext()  # type: ignore[assignment,return-value]
    for trial in range(trials):
        os.environ["S2S_RAY_CACHE"] = str(root / str(trial))
        pids = [fork(partial(fetch_and_check, source, digest)) for _ in range(32)]
        victims = set(rng.sample(pids, 10))
        for pid in victims:
            time.sleep(rng.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
        wait(pids, victims)
        assert [p.name for p in (root / str(trial) / "presets").iterdir()] == [digest], (SEED, trial)


def publish_race(url: str, sources: Path, name: str, rounds: int) -> None:
    """A round: all want one number, one gets it; then all want the next, each gets its own, and one reads meanwhile."""
    store, directories = PresetStore(url), sorted(sources.iterdir())
    digests = {Manifest.of_directory(d).digest for d in directories}
    for round_number in range(rounds):
        number = max(store.list().get(name, [0])) + 1
        won = sources.parent / "won" / f"{name}{round_number}"
        won.mkdir(parents=True)
        wait([fork(partial(publish_numbered, url, d, name, number, won)) for d in directories], set())
        (winner,) = won.iterdir()
        first = store.resolve(f"{name}@{number}").digest
        assert first == Manifest.of_directory(sources / winner.name).digest
        reader = fork(partial(read_newest, url, name, digests))
        wait([*(fork(partial(publish_next, url, d, name)) for d in directories), reader], set())
        found = {store.resolve(f"{name}@{n}").digest for n in store.list()[name] if n > number}
        assert found >= digests - {first}
    assert [*store.list()[name]] == list(range(1, max(store.list()[name]) + 1))


def publish_numbered(url: str, directory: Path, name: str, number: int, won: Path) -> None:
    try:
        PresetStore(url).publish(directory, name, version=number)
    except PresetError:
        return
    (won / directory.name).touch()


def publish_next(url: str, directory: Path, name: str) -> None:
    published = PresetStore(url).publish(directory, name)
    assert PresetStore(url).resolve(published).digest == Manifest.of_directory(directory).digest


def read_newest(url: str, name: str, digests: set[str]) -> None:
    """The newest version is at every moment a whole one, and never an older one than before."""
    seen = 0
    for _ in range(20):
        stored = PresetStore(url).resolve(name)
        assert stored.digest in digests and stored.version is not None and stored.version >= seen
        seen = stored.version
        manifest = Manifest.parse((stored.location / "manifest.json").read_bytes(), "manifest")
        assert manifest.digest == stored.digest
        for entry in manifest.files:
            assert sha256_bytes((stored.location / entry.name).read_bytes()) == entry.sha256


def crash(url: str, source: Path) -> None:
    """Publish with a crash at the first, second, ... failpoint, until one publish comes through."""
    store = PresetStore(url)
    for nth in range(1, 100):
        pid = fork(partial(publish_until, url, source, f"*:{nth}:exit"))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            assert nth > 10, nth
            return
        assert code == FAILPOINT_EXIT_CODE, code
        if store.list():  # the crash came after the commit
            fetch_and_check(Path(store.resolve("p@1").location.path), Manifest.of_directory(source).digest)
            store.location.delete(recursive=True)
    raise AssertionError("never came through")


def publish_until(url: str, source: Path, failpoint: str) -> None:
    os.environ["S2S_RAY_FAILPOINT"] = failpoint
    PresetStore(url).publish(source, "p")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "fetch":
        fetch_race(Path(arguments[0]), Path(arguments[1]), arguments[2], int(arguments[3]), arguments[4] == "locked")
    elif command == "crash":
        crash(arguments[0], Path(arguments[1]))
    else:
        publish_race(arguments[0], Path(arguments[1]), arguments[2], int(arguments[3]))
