"""The curve of a run is one, whatever trains it: one worker or two, DDP or FSDP2, in one go or with interruptions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import loop_run
import pytest
import torch

from s2s_ray import Seq2SeqLM
from s2s_ray.training.distributed import World

STEPS = 50
SETTINGS = {
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "linear", "warmup_steps": 5, "clip_norm": 1.0},
    "epochs": None,
    "max_steps": STEPS,
    "batch_tokens": 800,
    "micro_batch_tokens": 200,
    "log_every": 1,
    "checkpoint_every": 20,
    "seed": 3,
}
Spec = dict[str, Any]


@pytest.fixture(scope="session")
def rows(tiny_bart_dir: Path, pairs: dict[str, list[str]]) -> list[list[list[int]]]:
    preprocessor = Seq2SeqLM.from_preset(tiny_bart_dir).preprocessor
    sources, _ = preprocessor.encode_sources(pairs["encoder_text"], 64)
    return [list(pair) for pair in zip(sources, preprocessor.encode_targets(pairs["decoder_text"]), strict=True)]


@pytest.fixture(scope="session")
def spec(tiny_bart_dir: Path, rows: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory) -> Spec:
    directory = tmp_path_factory.mktemp("whole") / "checkpoints"
    return {"preset": str(tiny_bart_dir), "checkpoints": str(directory), "rows": rows, "settings": SETTINGS}


@pytest.fixture(scope="session")
def whole(spec: Spec) -> loop_run.Loop:
    """One worker, in one go."""
    torch.set_num_threads(1)
    return loop_run.run(spec, World(0, 1, torch.device("cpu")))


def changed(spec: Spec, directory: Path, stop_at: int | None = None, **settings: Any) -> Spec:
    return spec | {"checkpoints": str(directory), "settings": spec["settings"] | settings, "stop_at": stop_at}


def run_workers(specs: list[Spec], directory: Path, size: int = 2) -> list[dict[str, Any]]:
    """The runs, one after another, on `size` workers over gloo."""
    path = directory / "runs.json"
    path.write_text(json.dumps(specs))
    environment = {**os.environ, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, loop_run.__file__, str(path)]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * size, errors
    return json.loads(path.with_suffix(".json.out").read_text())


def curve(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log]


def test_two_workers_follow_the_curve_of_one(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    expected = curve(whole.log)
    assert len(expected) == STEPS and expected[-1] < 0.85 * expected[0]
    fsdp = {"strategy": "fsdp", "checkpoint_every": 5}
    stops = [changed(spec, tmp_path / "fsdp", stop_at=stop, **fsdp) for stop in (7, 12)]
    runs = run_workers([changed(spec, tmp_path / "ddp"), *stops], tmp_path)
    assert [run["start"] for run in runs] == [0, 0, 5]
    assert curve(runs[0]["log"]) == pytest.approx(expected, rel=1e-5)
    assert curve(runs[2]["log"]) == pytest.approx(expected[:12], rel=1e-5)


@pytest.mark.full
def test_fsdp_over_fifty_steps_and_a_change_of_strategy(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    whole_fsdp, _, then_ddp = run_workers(
        [
            changed(spec, tmp_path / "fsdp", strategy="fsdp"),
            changed(spec, tmp_path / "broken", stop_at=33, strategy="fsdp"),
            changed(spec, tmp_path / "broken"),
        ],
        tmp_path,
    )
    assert then_ddp["start"] == 20
    for run in (whole_fsdp, then_ddp):
        assert curve(run["log"]) == pytest.approx(curve(whole.log), rel=1e-5)


def test_a_run_that_was_stopped_continues_the_same_curve(spec: Spec, whole: loop_run.Loop, tmp_path: Path) -> None:
    world = World(0, 1, torch.device("cpu"))
    loop_run.run(changed(spec, tmp_path / "broken", stop_at=47), world)
    loop = loop_run.run(changed(spec, tmp_path / "broken"), world)
    assert loop.start == 40
    assert curve(loop.log) == curve(whole.log)  # bit by bit
    ours, theirs = (run.replica.backbone.state_dict() for run in (loop, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
