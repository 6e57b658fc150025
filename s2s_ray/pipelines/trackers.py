"""Where a fine-tuning run's figures go beside its report: Ray's metrics, TensorBoard, Weights & Biases, MLflow.

Figures of training are named train/NAME, those of an evaluation validation/NAME; names are those of report.json. The
run is found again by its fingerprint, so a resumed one goes on in the same W&B or MLflow run.
"""

import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from s2s_ray.errors import SettingsError
from s2s_ray.pipelines.cluster import first_line
from s2s_ray.storage import Location

# What --log-to knows: the module that each needs, which is in the extra of the tracker's name.
MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
GROUPS = {"log": "train", "evaluation": "validation"}
Event = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the events of training/loop.py."""

    def show(self, event: Event) -> None:
        """Send on what concerns it."""

    def close(self, failed: bool) -> None:
        """No event follows. failed: the run did not come to its end."""


def check(names: Sequence[str]) -> None:
    """Raise SettingsError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in MODULES:
            raise SettingsError(f"--log-to must be of {', '.join(MODULES)}. Received: {name!r}")
        if importlib.util.find_spec(MODULES[name]) is None:
            raise SettingsError(
                f"--log-to {name} needs the package {MODULES[name]}, which is not installed: "
                f"pip install 's2s_ray[{name}]'"
            )


@contextlib.contextmanager
def tracked(
    names: Sequence[str], output: Location, fingerprint: str, settings: Mapping[str, Any]
) -> Iterator[Callable[[Event], None]]:
    """Gives the function that hands an event to Ray's metrics and to each tracker of `names`.

    A tracker that cannot begin raises SettingsError; one that fails later is left out from then on, and training is not
    disturbed.
    """
    run = output.name
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(output / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(run, fingerprint, settings),
        "mlflow": lambda: MLflow(run, fingerprint, settings),
    }
    trackers: dict[str, Tracker] = {"Ray's metrics": RayMetrics(run)}
    for name in names:
        try:
            trackers[name] = makers[name]()
        except Exception as error:  # whatever the package raises when its settings or its server are wrong
            raise SettingsError(f"--log-to {name} could not begin: {first_line(error)}") from error

    def each(what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                what(tracker)
            except Exception as error:  # the run is worth more than its curves elsewhere
                del trackers[name]
                print(f"{name} failed and gets no more figures: {first_line(error)}", file=sys.stderr, flush=True)

    failed = True
    try:
        yield lambda event: each(lambda tracker: tracker.show(event))
        failed = False
    finally:
        each(lambda tracker: tracker.close(failed))


def figures(event: Event) -> dict[str, float]:
    """The numbers of a log or evaluation event, by the names that trackers show; none of other events."""
    group = GROUPS.get(event["kind"])
    numbers = {name: value for name, value in event.items() if name != "step" and isinstance(value, (int, float))}
    return {f"{group}/{name}": float(value) for name, value in numbers.items()} if group else {}


class RayMetrics:
    """Gauges such as `s2s_ray_train_loss`, with the tag `run`, where Ray exports its own metrics."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def show(self, event: Event) -> None:
        from ray.util.metrics import Gauge

        for name, value in {**figures(event), "train/step": float(event["step"])}.items():
            if name not in self._gauges:
                metric = re.sub(r"\W", "_", f"s2s_ray_{name}")
                self._gauges[name] = Gauge(metric, f"{name} of a fine-tuning run", tag_keys=("run",))
            self._gauges[name].set(value, {"run": self._run})

    def close(self, failed: bool) -> None:
        pass  # the last values stand until the driver ends


class TensorBoard:
    """Event files in `directory`; those on an object store are written here and uploaded with every checkpoint."""

    def __init__(self, directory: Location) -> None:
        self._directory = directory
        self._files = tempfile.TemporaryDirectory()  # stays empty for a local run
        self._writer: Any = None
        self._attempts = 0

    def show(self, event: Event) -> None:
        from tensorboardX import SummaryWriter

        if event["kind"] == "start":
            self._end()
            local = self._directory.path if self._directory.is_local else self._files.name
            self._attempts += 1  # two that begin in one second would write the same file
            self._writer = SummaryWriter(
                local, purge_step=event["step"] + 1, filename_suffix=f".{self._attempts}"
            )  # purged: what a lost attempt wrote after this step
        for name, value in figures(event).items():
            self._writer.add_scalar(name, value, event["step"])
        self._writer.flush()
        if event["kind"] == "checkpoint":
            self._upload()

    def close(self, failed: bool) -> None:
        self._end()
        self._files.cleanup()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._upload()

    def _upload(self) -> None:
        for path in sorted(Path(self._files.name).iterdir()):
            (self._directory / path.name).upload(path)


class WeightsAndBiases:
    """A run of the project WANDB_PROJECT (default s2s_ray), by W&B's own environment variables."""

    def __init__(self, run: str, fingerprint: str, settings: Mapping[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "s2s_ray")
        self._run = wandb.init(project=project, name=run, id=fingerprint, resume="allow", config=dict(settings))

    def show(self, event: Event) -> None:
        if found := figures(event):
            self._run.log(found, step=event["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (default s2s_ray), where MLFLOW_TRACKING_URI says."""

    def __init__(self, run: str, fingerprint: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "s2s_ray")
        experiment = self._client.get_experiment_by_name(name)
        where = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([where], f"tags.s2s_ray_fingerprint = '{fingerprint}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(where, run_name=run, tags={"s2s_ray_fingerprint": fingerprint}).info.run_id
        self._client.log_batch(self._id, params=[Param(key, str(value)) for key, value in settings.items()])

    def show(self, event: Event) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, event["step"]) for name, value in figures(event).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
