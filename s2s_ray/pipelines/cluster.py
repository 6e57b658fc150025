"""Ray as a job uses it: a session, the share of the cluster each stage gets, and a quiet execution."""

import contextlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2s_ray import errors
from s2s_ray.errors import InfrastructureError, S2SRayError
from s2s_ray.pipelines.settings import GenerateSettings

if TYPE_CHECKING:
    import ray.data

LEAST_UNITS, MOST_UNITS = 4, 16  # in one engine at a time: the tail of one is filled by the next
GPU_ROWS = 32_768  # in an engine on a GPU, where units are small: many times what it decodes at one time
TASK_CPUS = 0.25  # reading and committing wait for storage half of the time
STALL_SECONDS = 1800.0
INIT_DEATHS = 3  # of replicas in a row, while they load the model
RAY_STARTS = 3  # Ray gives its own processes 30 s to start, which may be too short on a busy machine


@dataclass(frozen=True, slots=True)
class Resources:
    """How many replicas, and what each of them and each CPU task reserves."""

    replicas: tuple[int, int]
    replica_cpus: float
    replica_gpus: float
    threads: int | None  # of torch, per replica; None leaves it to torch
    calls: int  # units in one replica's engine at a time
    task_cpus: float = TASK_CPUS

    @classmethod
    def of(
        cls, settings: GenerateSettings, cluster: Mapping[str, float], nodes: int, rows_per_unit: int
    ) -> "Resources":
        """Replicas take at most half of the CPUs there are now, so that the CPU stages can always run beside them."""
        cpus, all_gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
        gpus = settings.gpus_per_replica
        if gpus is None:
            gpus = 1.0 if all_gpus and settings.device != "cpu" else 0.0
        automatic = max(1, int(all_gpus // gpus)) if gpus else max(1, nodes)
        replicas = settings.replica_range() or (automatic, automatic)
        share = cpus / replicas[1] if cpus else 2.0
        replica_cpus = min(1.0, share / 2) if gpus else share / 2
        threads = None if gpus else max(1, min(int(share), os.cpu_count() or 1))
        calls = min(MOST_UNITS, max(LEAST_UNITS, GPU_ROWS // rows_per_unit)) if gpus else LEAST_UNITS
        return cls(replicas, math.floor(replica_cpus * 1000) / 1000, gpus, threads, calls)

    def pool(self) -> Any:
        """The actor pool; it keeps as many units queued at a replica as are at work in it."""
        import ray.data

        low, high = self.replicas
        return ray.data.ActorPoolStrategy(
            min_size=low,
            max_size=high,
            initial_size=low,
            max_concurrent_calls_per_actor=self.calls,
            max_tasks_in_flight_per_actor=2 * self.calls,
        )


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to `address`, RAY_ADDRESS or this process's session; else start a Ray here, and stop it afterwards."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    token = Path("~/.ray/auth_token").expanduser()
    had_token = token.exists()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False}
        # Ray Data's actor pools make the core worker print an error about their arguments that concerns clusters only.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for left in reversed(range(RAY_STARTS if address == "local" else 1)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            break
        except Exception as error:  # Ray raises bare ones here
            if not left:
                raise InfrastructureError(f"Ray could not be reached at {address}: {first_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler aborts the process
    if not had_token and token.exists():
        token.chmod(0o600)  # Ray 2.60 writes it readable for all
    try:
        yield
    finally:
        ray.shutdown()


def execute(dataset: "ray.data.Dataset", stall_timeout: float = STALL_SECONDS) -> Iterator[dict[str, Any]]:
    """The rows of the dataset as they come. Raises the S2SRayError a stage raised, else InfrastructureError, also when
    nothing has moved for `stall_timeout` seconds.
    """
    with execution(dataset, stall_timeout):
        yield from dataset.iter_rows()


@contextlib.contextmanager
def execution(dataset: "ray.data.Dataset", stall_timeout: float = STALL_SECONDS) -> Iterator[None]:
    """Around whatever executes the dataset: quiet, and with the errors of `execute`."""
    import ray.data.exceptions

    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = stall_timeout
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise InfrastructureError(f"nothing moved for {stall_timeout:.0f} s: {first_line(error)}") from error
    except Exception as error:  # whatever Ray raises, a rerun goes on from what is committed
        raise _cause(error) from error


def _cause(error: BaseException) -> S2SRayError:
    """The typed error inside Ray's wrappers."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        if isinstance(inner, S2SRayError):
            # Ray gives a stage's error a class of its own that also derives from the original's.
            return next((c for c in (getattr(inner, "cause", None),) if isinstance(c, S2SRayError)), inner)
        seen.add(id(inner))
        inner = getattr(inner, "cause", None) or inner.__cause__
    # The cause of a chained exception does not survive its way here from another process, but for its text.
    first = first_line(error, "\nThe above exception was the direct cause")
    name, _, message = first.removeprefix(f"{errors.__name__}.").partition(": ")
    kind = getattr(errors, name, None) if first.startswith(errors.__name__) else None
    if isinstance(kind, type) and issubclass(kind, S2SRayError):
        return kind(message)
    return InfrastructureError(f"the cluster failed: {first}")


def first_line(error: BaseException, until: str = "\0") -> str:
    """The line of an error's text (before `until`) that says what happened, which in Ray's is the last."""
    lines = [line.strip() for line in str(error).partition(until)[0].splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]
