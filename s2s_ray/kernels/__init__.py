"""Triton kernels of the CUDA path. Each has a plain torch twin that it is tested against."""

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError:  # no Triton
        return None


def load(name: str, device: torch.device) -> ModuleType | None:
    """The kernels of one module, where they can run on the device; else None."""
    return _module(name) if device.type == "cuda" else None
