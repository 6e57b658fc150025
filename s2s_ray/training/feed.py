"""Batches without padding on the device, made while the step before runs."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable

import torch

from s2s_ray.training.batches import Batch

PREFETCHED_BATCHES = 4


def on_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch]:
    """The batches on `device`; for CUDA they are made, pinned and copied by a thread while the step before runs."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.packed().to(device)
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            torch.cuda.set_device(index)  # a thread begins on the first
            for batch in batches:
                if not put(batch.packed().pin()):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    producer = threading.Thread(target=produce, daemon=True)
    producer.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.to(device, non_blocking=True)
    finally:
        stop.set()
        producer.join()  # the caller may iterate the same data again
