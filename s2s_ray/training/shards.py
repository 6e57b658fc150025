"""Tokenised pairs on disk: Arrow files that are mapped into memory, so that all workers of a node share their pages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2s_ray.errors import InfrastructureError
from s2s_ray.training.batches import Examples, Ragged, RaggedParts

COLUMNS = ("source", "labels")  # lists of int32, special tokens included; one record batch a file


def open_shards(paths: Sequence[Path], start: int, pad: int) -> Examples:
    """The pairs of these files, in order; `start` and `pad` as in Examples. Raises InfrastructureError for damage."""
    sides: tuple[list[Ragged], list[Ragged]] = ([], [])
    for path in paths:
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            batch.validate(full=True)
            for side, name in zip(sides, COLUMNS, strict=True):
                side.append(_ragged(batch.column(name)))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InfrastructureError(
                f"{path} must be a file of token ids: {error}. Delete it, and run again"
            ) from error
    return Examples(RaggedParts(sides[0]), RaggedParts(sides[1]), start, pad)


def _ragged(column: pa.ListArray) -> Ragged:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]], np.diff(offsets))
