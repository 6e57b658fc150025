"""A Ray Train worker group as the fine-tuning job and `fit` use it: started, watched, and its errors brought back."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from s2s_ray.errors import InfrastructureError, S2SRayError
from s2s_ray.pipelines.cluster import first_line
from s2s_ray.storage import Location

if TYPE_CHECKING:
    import torch

COLLECTIVE_TIMEOUT_SECONDS = 1800
Event = dict[str, Any]
Work = Callable[[dict[str, Any], "torch.device", Callable[[Event], None]], Any]  # (config, device, emit) to a result


def run_workers(
    work: Work,
    config: dict[str, Any],
    *,
    num_workers: tuple[int, int],
    cpus_per_worker: float,
    device: str | None,
    max_failures: int,
    storage: Location,
    show: Sequence[Callable[[Event], None]],
) -> Any:
    """Run `work` on every worker, between the fewest and the most; returns what rank 0's returned.

    device: "cpu", "cuda", or None for a GPU each where the cluster has some. max_failures: lost workers after which the
    group is started anew. storage: a directory for Ray Train, deleted at the end. show: each is given every event
    of the workers, in a thread. Raises the S2SRayError a worker raised, or InfrastructureError.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    train: Any = ray.train  # its types are still the first version's
    on_gpu = device == "cuda" or (device is None and ray.cluster_resources().get("GPU", 0) > 0)
    low, high = num_workers
    events = Queue(actor_options={"num_cpus": 0})
    filesystem, path = storage.filesystem_for_arrow()
    storage.make_directory()
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={"work": work, "config": config, "events": events, "threads": max(1, int(cpus_per_worker))},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
        scaling_config=train.ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=train.RunConfig(
            name=os.urandom(8).hex(),  # a name that was used makes Ray Train look for checkpoints of its own
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=train.FailureConfig(max_failures=max_failures),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    listener = _Listener(events, show)
    try:
        result: Any = trainer.fit()
    except train.TrainingFailedError as error:
        raise InfrastructureError(f"training failed: {first_line(error)}. Run the same again to go on") from error
    finally:
        listener.close()
        storage.delete(recursive=True)
    if listener.error is not None:
        raise listener.error
    return result.return_value


class _Listener:
    """Hands on the workers' events as they come, in a thread; keeps the error one of them ended with."""

    def __init__(self, events: Any, show: Sequence[Callable[[Event], None]]) -> None:
        self.error: S2SRayError | None = None
        self._events = events
        self._show = show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="s2s_ray progress", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand on what is still there, and end."""
        self._stop.set()
        self._thread.join()

    def _listen(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            try:
                event = self._events.get(timeout=0.5)
            except Empty:
                if self._stop.is_set():
                    return
                continue
            except RayError:
                return
            if event["kind"] == "error":
                self.error = event["error"]
            else:
                for show in self._show:
                    show(event)


def _on_worker(group: dict[str, Any]) -> Any:
    """What every worker runs. An expected error ends all workers alike, without Ray Train trying again."""
    import torch
    from ray import train
    from ray.train.torch import get_device

    rank = train.get_context().get_world_rank()
    emit: Callable[[Event], None] = group["events"].put
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(group["threads"])
    try:
        return group["work"](group["config"], device, emit)
    except S2SRayError as error:
        if isinstance(error, InfrastructureError):
            raise
        if rank == 0:
            emit({"kind": "error", "error": error})
        return None
