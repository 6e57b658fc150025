"""Figures that leave the job, read back from where they went: event files, MLflow's and W&B's own stores."""

import struct
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from s2s_ray.errors import SettingsError
from s2s_ray.pipelines import trackers
from s2s_ray.storage import Location

EVENTS: list[dict[str, Any]] = [
    {"kind": "start", "step": 0, "steps": 4, "pids": [1]},
    {"kind": "log", "step": 1, "loss": 3.0, "learning_rate": 0.5, "epoch": 0},
    {"kind": "log", "step": 2, "loss": 9.0, "learning_rate": 0.25, "epoch": 0},  # lost: the next attempt begins at 1
    {"kind": "start", "step": 1, "steps": 4, "pids": [2]},
    {"kind": "log", "step": 2, "loss": 2.0, "learning_rate": 0.25, "epoch": 0},
    {"kind": "evaluation", "step": 2, "val_loss": 2.5, "rougeL": 0.25, "signatures": {"rougeL": "x"}},
    {"kind": "checkpoint", "step": 2},
]
EXPECTED = {"train/loss": [3.0, 2.0], "validation/val_loss": [2.5], "validation/rougeL": [0.25]}


def run(names: Sequence[str], output: Path | str, events: Sequence[dict[str, Any]] = EVENTS) -> None:
    with trackers.tracked(names, Location.parse(output), "f" * 32, {"learning_rate": 0.5, "epochs": None}) as show:
        for event in events:
            show(event)


def scalars(files: list[bytes]) -> dict[str, list[float]]:
    """Of TensorBoard's event files in order, what a session purged left out as TensorBoard does."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for content in files:
        while content:  # a record: length, its checksum, data, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                found = {name: {s: v for s, v in points.items() if s < event.step} for name, points in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {name: list(points.values()) for name, points in found.items()}


def test_tensorboard_files_hold_the_curves_without_what_was_lost(tmp_path: Path, s3_server: str) -> None:
    remote = Location.parse(f"{s3_server}/{tmp_path.name}/run")
    run(["tensorboard"], tmp_path)
    run(["tensorboard"], remote.url)
    local = [path.read_bytes() for path in sorted((tmp_path / "tensorboard").iterdir())]
    stored = remote / "tensorboard"
    for files in (local, [(stored / name).read_bytes() for name in sorted(stored.list_names())]):
        found = scalars(files)
        assert {name: found[name] for name in EXPECTED} == EXPECTED
        assert found["train/learning_rate"] == [0.5, 0.25] and "train/step" not in found


def test_mlflow_gets_one_run_for_both_attempts_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://known")
    with pytest.raises(SettingsError, match="--log-to mlflow could not begin"):
        run(["mlflow"], tmp_path / "out")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    run(["mlflow"], tmp_path / "out", EVENTS[:2])
    run(["mlflow"], tmp_path / "out", EVENTS[3:])
    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("s2s_ray").experiment_id])
    assert (found.info.run_name, found.info.status) == ("out", "FINISHED")
    assert found.data.params == {"learning_rate": "0.5", "epochs": "None"}
    for name, values in EXPECTED.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == list(enumerate(values, 3 - len(values)))


def test_wandb_writes_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(["wandb"], tmp_path / "out", EVENTS[3:])
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert path.name == f"run-{'f' * 32}.wandb"
    content, found = path.read_bytes()[7:], dict[str, list[float]]()  # LevelDB's log format; all in its first block
    while len(content) > 7:
        _, length, kind = struct.unpack("<IHB", content[:7])
        assert kind == 1  # a whole record
        for item in wandb_internal_pb2.Record.FromString(content[7 : 7 + length]).history.item:
            found.setdefault(item.key or "/".join(item.nested_key), []).append(float(item.value_json))
        content = content[7 + length :]
    assert (found["train/loss"], found["validation/rougeL"], found["_step"]) == ([2.0], [0.25], [2.0])


@pytest.mark.full
def test_rays_metrics_are_exported(local_ray: None, tmp_path: Path) -> None:
    import ray

    run([], tmp_path / "run7", EVENTS[3:])
    (node,) = ray.nodes()
    wanted = 'run="run7"'
    for _ in range(60):  # Ray exports every 10 s
        with urllib.request.urlopen(
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        ) as answer:
            lines = [line for line in answer.read().decode().splitlines() if wanted in line]
        if lines:
            break
        time.sleep(1)
    (line,) = (line for line in lines if "s2s_ray_train_loss" in line)
    assert line.endswith(" 2.0")


def test_what_is_not_known_or_not_installed_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"--log-to must be of tensorboard, wandb, mlflow. Received: 'comet'"):
        trackers.check(["comet"])
    monkeypatch.setitem(trackers.MODULES, "wandb", "no_such_module")
    with pytest.raises(SettingsError, match=r"needs the package no_such_module.*pip install 's2s_ray\[wandb\]'"):
        trackers.check(["tensorboard", "wandb"])


def test_a_tracker_that_fails_later_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    run(["tensorboard"], tmp_path)
    assert capsys.readouterr().err.count("tensorboard failed and gets no more figures") == 1
