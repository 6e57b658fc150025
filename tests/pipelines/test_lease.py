"""The lease keeps a second job away, and never for longer than its owner lives."""

import os
import time
from pathlib import Path

import pytest
from job_helpers import wait_for

from s2s_ray.errors import OwnedElsewhereError
from s2s_ray.pipelines import lease as module
from s2s_ray.pipelines.lease import Lease
from s2s_ray.storage import Location, canonical_json


def test_one_at_a_time(tmp_path: Path) -> None:
    directory = Location.parse(tmp_path / "_s2s")
    with Lease(directory):
        with pytest.raises(OwnedElsewhereError, match=f"process {os.getpid()}"), Lease(directory):
            pass
        assert directory.list_names() == ["owner.json"]
    assert directory.list_names() == []
    with Lease(directory):
        pass


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    directory = Location.parse(tmp_path)
    pid = os.fork()
    if not pid:
        Lease(directory).__enter__()
        os._exit(0)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT) is None:  # dead, and not yet reaped
        pass
    with Lease(directory):
        pass
    os.waitpid(pid, 0)


@pytest.mark.parametrize("age,taken", [(module.STALE_SECONDS + 5, True), (module.STALE_SECONDS - 30, False)])
def test_a_lease_of_another_machine_goes_stale(tmp_path: Path, age: float, taken: bool) -> None:
    owner = {"id": "x", "host": "elsewhere", "pid": 1, "started": "1", "heartbeat": time.time() - age}
    (Location.parse(tmp_path) / "owner.json").write_atomic(canonical_json(owner))
    if taken:
        with Lease(Location.parse(tmp_path)):
            pass
    else:
        with pytest.raises(OwnedElsewhereError, match="on elsewhere"), Lease(Location.parse(tmp_path)):
            pass


def test_a_lost_lease_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    path = Location.parse(tmp_path) / "owner.json"
    with Lease(Location.parse(tmp_path)) as lease:
        first = path.read_bytes()
        wait_for(lambda: path.read_bytes() != first, what="a heartbeat")
        assert not lease.lost
        # A heartbeat may be between its look and its write: then it wins over this one, as it may over any other job.
        wait_for(lambda: path.write_atomic(canonical_json({"id": "other"})) or lease.lost, what="the loss")
        with pytest.raises(OwnedElsewhereError):
            lease.check()
    assert path.exists()  # the other's
