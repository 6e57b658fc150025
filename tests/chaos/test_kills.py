"""SIGKILL of an actor and of the driver, SIGTERM, two jobs at once; each job is a process with a Ray of its own."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from checker import Verdict, check
from job_helpers import JobProcess, run_job, wait_for, write_input

from s2s_ray.pipelines.publish import verify
from s2s_ray.seq2seq_lm import Seq2SeqLM
from s2s_ray.storage import Location

pytestmark = pytest.mark.timeout(900)  # a busy machine is no fault
ROWS = 96
SLOW = {"S2S_RAY_FAILPOINT": "row.*:0:sleep=0.06"}  # each unit takes a while at its replica


@pytest.fixture(scope="module")
def texts(english_text: list[str]) -> list[str]:
    return [text[: 40 + 7 * (row % 17)] for row, text in enumerate(english_text[:ROWS])]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[str]:
    return write_input(tmp_path_factory.mktemp("input"), texts, files=2, group=16)


@pytest.fixture(scope="module")
def expected(texts: list[str], tiny_bart_dir: Path) -> dict[int, str]:
    return dict(enumerate(Seq2SeqLM.from_preset(tiny_bart_dir).generate(texts, max_new_tokens=12)))


@pytest.fixture
def flags(inputs: list[str], tiny_bart_dir: Path, tmp_path: Path) -> list[str]:
    places = ["--input", *inputs, "--output", str(tmp_path / "out"), "--preset", str(tiny_bart_dir)]
    return [*places, "--max-target-length", "12", "--rows-per-unit", "4"]


def assert_sound(inputs: list[str], output: Path, expected: dict[int, str]) -> Verdict:
    verdict = check(inputs, str(output))
    assert (verdict.lost, verdict.doubled, verdict.problems) == ([], [], [])
    assert verdict.summaries() == expected
    verify(Location.parse(output))
    return verdict


def commits(output: Path) -> set[str]:
    return {path.name for path in output.glob("_s2s/*/commit/u*.json")}


def starts(output: Path) -> Counter[str]:
    """How often each unit was started so far."""
    return Counter(path.name.split(".")[0] for path in output.glob("_s2s/*/attempts/u*"))


@pytest.mark.full  # by itself a tenth of the time of all short tests
def test_race_kill_cancel_kill_resume(
    flags: list[str], inputs: list[str], tmp_path: Path, expected: dict[int, str]
) -> None:
    """P21, P3, P23, P1, P22: a second job is turned away; the driver is killed, its successor cancelled, and the actor
    of the third killed with units in flight. It finishes, and a fourth finds nothing to do.

    Commits of killed runs stay as they are, and only what they left is generated.
    """
    output = tmp_path / "out"
    first = JobProcess("generate.py", *flags, **SLOW)
    wait_for(lambda: (output / "_s2s" / "owner.json").exists(), what="the first job's lease")
    code, _, error = run_job("generate.py", *flags)
    assert code == 6 and "is being written by process" in error and error.count("\n") == 1
    wait_for(lambda: len(commits(output)) >= 3, what="three commits")
    first.kill()
    kept = {path: path.read_bytes() for path in output.glob("_s2s/*/commit/u*.json")}

    second = JobProcess("generate.py", *flags, **SLOW)
    wait_for(lambda: second.replica_pids(), what="the second job's replica")
    wait_for(lambda: not first.replica_pids(), what="the end of the killed job's Ray")
    before = len(commits(output))
    wait_for(lambda: len(commits(output)) >= before + 2, what="commits of the second job")
    second.process.terminate()
    code, _, error = second.finish()
    assert code == 143 and "run the same command again to resume" in error
    assert not (output / "_s2s" / "owner.json").exists() and not (output / "_manifest.json").exists()
    wait_for(lambda: not second.replica_pids(), what="the end of the second job's Ray")

    before = len(commits(output))
    third = JobProcess("generate.py", *flags, **SLOW)
    try:
        wait_for(lambda: len(commits(output)) > before, what="a commit of the third job")
        (victim,) = third.replica_pids()
        os.kill(victim, signal.SIGKILL)
        started = starts(output)
        code, out, error = third.finish()
    finally:
        third.process.kill()
    assert code == 0, error
    assert f"{ROWS - 4 * before} rows in" in out and before < ROWS / 4
    assert {path: path.read_bytes() for path in kept} == kept
    assert_sound(inputs, output, expected)
    assert any(starts(output)[unit] > count for unit, count in started.items()), "the kill came too late to matter"
    code, out, error = run_job("generate.py", *flags)
    assert (code, "0 rows generated" in out) == (0, True)
