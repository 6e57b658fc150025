"""Tokenised pairs on disk: Arrow files that are mapped into memory, so that all workers of a node share their pages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2s_ray.errors import InfrastructureError
from s2s_ray.training.batches import Examples, Ragged, RaggedParts

# Lists of int32, special tokens included; beside them `start`, what the row's decoder starts from. One batch a file.
COLUMNS = ("source", "labels")


def open_shards(paths: Sequence[Path], pad: int) -> Examples:
    """The pairs of these files, in order; `pad` as in Examples. Raises InfrastructureError for damage."""
    batches = []
    for path in paths:
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
            batch.validate(full=True)
            examples_of([batch], pad)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise InfrastructureError(
                f"{path} must be a file of token ids: {error}. Delete it, and run again"
            ) from error
        batches.append(batch)
    return examples_of(batches, pad)


def examples_of(batches: Sequence[pa.RecordBatch], pad: int) -> Examples:
    """The pairs of these batches, in order, without a copy of their ids."""
    sources, labels = (RaggedParts([_ragged(batch.column(name)) for batch in batches]) for name in COLUMNS)
    starts = [np.empty(0, np.int32), *(batch.column("start").to_numpy() for batch in batches)]
    return Examples(sources, labels, np.concatenate(starts), pad)


def _ragged(column: pa.ListArray) -> Ragged:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]], np.diff(offsets))
