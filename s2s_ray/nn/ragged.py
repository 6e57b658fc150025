"""Rows of different lengths one after another, without padding, and attention within each of them.

Dimensions: R rows, T tokens of all rows together, H heads, I = heads x head size.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from s2s_ray import kernels
from s2s_ray.kernels import reference
from s2s_ray.nn.positions import RelativeBias


def attention_kernels(device: torch.device) -> ModuleType:
    """The attention functions for a device: Triton's on CUDA where it is installed, else plain torch."""
    return kernels.load("attention", device) or reference


class RaggedRows:
    """Where each row lies among T tokens. `table` is the relative bias in force, `[H, 2 F + 1]` or None; `inside` bool
    `[R, longest]`, on the host, and `padding_mask`, on the device, are True for tokens. `lengths` are those given.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._kernels = attention_kernels(device)
        self.lengths = lengths
        size = self._kernels.QUERY_BLOCK
        counts = np.asarray(lengths)
        of_row = -(-counts // size)  # blocks
        row = np.repeat(np.arange(len(counts)), of_row)
        first = (np.arange(len(row)) - np.repeat(of_row.cumsum() - of_row, of_row)) * size
        self.inside = np.arange(counts.max()) < counts[:, None]
        tables = {
            "starts": np.concatenate(([0], counts.cumsum())).astype(np.int32),
            "blocks": np.stack((row, first), axis=1).astype(np.int32),
            "index": np.flatnonzero(self.inside),
            "inside": self.inside,
        }
        held = all_to_device({name: torch.from_numpy(table) for name, table in tables.items()}, device)
        self.starts, self.blocks, self._index, self.padding_mask = held.values()
        self.table: Tensor | None = None

    def use(self, bias: RelativeBias | None) -> None:
        """From the next layer on the scores get this bias; None leaves the one in force."""
        if bias is not None:
            self.table = bias.table().contiguous()

    def pack(self, x: Tensor) -> Tensor:
        """`[R, longest, ...]` to `[T, ...]`."""
        return x.flatten(0, 1)[self._index]

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[R, longest, ...]`, zeros for padding."""
        padded = x.new_zeros(self.inside.size, *x.shape[1:]).index_copy_(0, self._index, x)
        return padded.unflatten(0, self.inside.shape)

    def attend(self, qkv: Tensor, *, heads: int, scale: float) -> Tensor:
        """Queries, keys and values side by side `[T, 3 I]` to the attention output `[T, I]`."""
        return self._kernels.ragged(qkv, self.starts, self.blocks, self.table, heads=heads, scale=scale)


def pad_sources(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, RaggedRows]:
    """Token ids int64 `[R, longest]` with zeros for padding, and the rows; an empty source is one zero."""
    ids = [np.asarray(source if len(source) else (0,), np.int64) for source in sources]
    rows = RaggedRows([len(source) for source in ids], device)
    padded = np.zeros(rows.inside.shape, np.int64)
    padded[rows.inside] = np.concatenate(ids)
    return to_device(torch.from_numpy(padded), device), rows


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def all_to_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of small tensors, all of one dtype sent at once: a transfer costs the host more than these bytes do."""
    if device.type != "cuda":
        return {name: to_device(tensor, device) for name, tensor in tensors.items()}
    sent: dict[str, Tensor] = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        group = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        joint = to_device(torch.cat([tensor.flatten() for tensor in group.values()]), device)
        parts = joint.split([tensor.numel() for tensor in group.values()])
        sent |= {name: part.view(group[name].shape) for name, part in zip(group, parts, strict=True)}
    return {name: sent[name] for name in tensors}
