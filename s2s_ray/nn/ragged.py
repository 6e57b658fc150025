"""Rows of different lengths one after another, without padding, and attention within each of them.

Dimensions: R rows, T tokens of all rows together, H heads, I = heads x head size.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from s2s_ray import kernels
from s2s_ray.kernels import reference
from s2s_ray.nn.positions import RelativeBias


def attention_kernels(device: torch.device) -> ModuleType:
    """The attention functions for a device: Triton's on CUDA where it is installed, else plain torch."""
    return kernels.load("attention", device) or reference


class RaggedRows:
    """Where each row lies among T tokens. `table` is the relative bias in force, `[H, 2 F + 1]` or None."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._kernels = attention_kernels(device)
        size = self._kernels.QUERY_BLOCK
        longest = max(lengths)
        counts = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)))
        blocks = [(row, first) for row, length in enumerate(lengths) for first in range(0, length, size)]
        inside = torch.arange(longest) < counts[:, None]
        self.starts = to_device(starts, device)
        self.blocks = to_device(torch.tensor(blocks, dtype=torch.int32), device)
        self._index = to_device(inside.flatten().nonzero().squeeze(1), device)
        self.padding_mask = to_device(inside, device)
        self.table: Tensor | None = None

    def use(self, bias: RelativeBias | None) -> None:
        """From the next layer on the scores get this bias; None leaves the one in force."""
        if bias is not None:
            self.table = bias.table().contiguous()

    def pack(self, x: Tensor) -> Tensor:
        """`[R, longest, ...]` to `[T, ...]`."""
        return x.flatten(0, 1)[self._index]

    def attend(self, qkv: Tensor, *, heads: int, scale: float) -> Tensor:
        """Queries, keys and values side by side `[T, 3 I]` to the attention output `[T, I]`."""
        return self._kernels.ragged(qkv, self.starts, self.blocks, self.table, heads=heads, scale=scale)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
