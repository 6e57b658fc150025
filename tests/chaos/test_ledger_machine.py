"""Any interleaving of drivers at storage operations, with failures, lost answers and crashes, chosen by Hypothesis."""

import copy
import json
from collections.abc import Callable
from typing import Any, Self

import pyarrow.fs as pafs
import pytest
from checker import check
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from job_helpers import write_input
from ledger_run import LedgerRun, new_output
from stepped import CRASH, FAIL, OK, UNKNOWN, Crash, Driver, Store

from s2s_ray.pipelines import ledger as ledger_module
from s2s_ray.pipelines import publish as publish_module
from s2s_ray.pipelines import retries
from s2s_ray.pipelines.ledger import Ledger
from s2s_ray.pipelines.publish import verify
from s2s_ray.storage import Location, sha256_bytes

ROWS = 14
VERDICTS = st.sampled_from([OK, OK, FAIL, UNKNOWN, UNKNOWN, CRASH])
counts = {"runs": 0, "faults": 0, "crashes": 0, "steps": 0, "lost": 0, "doubled": 0, "generated": 0, "units": 0}


class LedgerMachine(RuleBasedStateMachine):
    """Up to three drivers of one run, no lease between them; a fourth, undisturbed, must always be able to finish.

    Neighbouring drivers write the same rows in other bytes, as a model in bfloat16 and other batches may.
    """

    originals: list[LedgerRun]
    mode = "auto"

    @initialize()
    def start(self) -> None:
        self.store = Store()
        self.drivers: list[Driver] = []
        self.records: dict[str, bytes] = {}

    def run(self, filesystem: Any) -> LedgerRun:
        run = copy.copy(self.originals[len(self.drivers) % len(self.originals)])
        run.output = Location("/out", "memory", filesystem)
        run.ledger = Ledger(run.output, run.ledger.fingerprint)
        return run

    @property
    def live(self) -> list[Driver]:
        return [driver for driver in self.drivers if not driver.ended]

    @precondition(lambda self: len(self.live) < 3)
    @rule()
    def new_driver(self) -> None:
        self.drivers.append(Driver(self.store, lambda filesystem: self.run(filesystem).drive()))

    @precondition(lambda self: self.live)
    @rule(who=st.integers(0, 2), steps=st.integers(1, 12), verdict=VERDICTS)
    def go_on(self, who: int, steps: int, verdict: str) -> None:
        """Some operations of one driver; the last of them ends as `verdict` says."""
        driver = self.live[who % len(self.live)]
        for number in range(1, steps + 1):
            if not driver.ended:
                driver.step(verdict if number == steps else OK)
                counts["steps"] += 1
        counts["faults"] += verdict in (FAIL, UNKNOWN)
        counts["crashes"] += verdict == CRASH

    @invariant()
    def a_record_stays_as_it_is(self) -> None:
        records = {path: bytes(file.getvalue()) for path, file in self.store.store.items() if "/commit/" in path}
        assert {path: records.get(path) for path in self.records} == self.records
        self.records = records

    @invariant()
    def a_manifest_names_what_is_there(self) -> None:
        """I3: whoever reads through the manifest sees nothing or everything."""
        manifest = self.store.store.get("/out/_manifest.json")
        for part in json.loads(manifest.getvalue())["parts"] if manifest is not None else []:
            for entry in filter(None, (part["data"], part["errors"])):
                content = self.store.store[f"/out/{entry['path']}"].getvalue()
                assert sha256_bytes(content) == entry["sha256"]

    def teardown(self) -> None:
        for driver in self.live:
            driver.step(CRASH)
        for driver in self.drivers:
            assert driver.error is None or isinstance(driver.error, (Crash, OSError)), driver.error
        last = Driver(self.store, lambda filesystem: self.run(filesystem).drive())
        last.finish()
        assert last.error is None, last.error
        self.a_record_stays_as_it_is()
        self.a_manifest_names_what_is_there()
        filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(self.store))
        verdict = check(self.originals[0].inputs, "/out", output_filesystem=filesystem) if self.mode == "auto" else None
        if verdict is not None:
            assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
            assert verdict.rows + verdict.error_rows == ROWS
        assert verify(Location("/out", "memory", self.store))["rows"] == ROWS - 2
        counts["runs"] += 1


class OneAfterAnother:
    """In place of a pool: after an error one more task may begin in a pool, or not, and Hypothesis repeats its runs."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    map = staticmethod(map)


@pytest.mark.timeout(1800)  # with --full
@pytest.mark.parametrize("mode", ["auto", "none"])
def test_any_interleaving_of_drivers_gives_one_sound_output(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch,
    record: Callable[..., None], mode: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)  # so that drivers give up, too, with a result unknown
    for module in (ledger_module, publish_module):
        monkeypatch.setattr(module, "ThreadPoolExecutor", OneAfterAnother)
    directory = tmp_path_factory.mktemp("input")
    inputs = write_input(directory, [f"text {row}" for row in range(ROWS)], files=2, group=5)
    originals = [LedgerRun(inputs, new_output(directory), 5, mode, codec) for codec in ("snappy", "zstd", "gzip")]
    machine = type("Machine", (LedgerMachine,), {"originals": originals, "mode": mode})
    counts.update(dict.fromkeys(counts, 0))
    full = pytestconfig.getoption("--full")
    profile = settings(
        max_examples=400 if full else 25,
        stateful_step_count=30,
        deadline=None,
        derandomize=not full,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink] if full else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        database=None,
    )
    run_state_machine_as_test(machine, settings=profile)
    record(
        f"ledger, {counts['runs']} interleavings of up to 3 drivers (publish {mode}): I/O error, lost answer, crash",
        injected=counts["faults"] + counts["crashes"], rows=counts["runs"] * ROWS, lost=0, doubled=0,
    )  # fmt: skip
    assert counts["runs"] >= 20 and counts["faults"] > 20 and counts["crashes"] > 10
