"""Variables from KerasHub's HDF5 weight files to one safetensors file, array by array.

An HDF5 file may hold links to other files, data sets that lie elsewhere, filters that expand, and shapes with nothing
behind them. Here it holds plain contiguous arrays of the expected names, shapes and dtypes, or it is refused, before
an array is read.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets.keras_families import Variable
from s2s_ray.presets.weights import ITEM_BYTES
from s2s_ray.text.tokenizer import read_json_object

SINGLE_FILE, INDEX_FILE = "model.weights.h5", "model.weights.json"
SHARD = re.compile(r"model_\d{5}\.weights\.h5")
_MAX_GROUPS = 16
_DTYPES = {"<f4": "F32", "<f2": "F16"}


def convert_weights(source: Path, target: Path, variables: Sequence[Variable]) -> None:
    """Write the safetensors file `target` from the HDF5 files in the directory `source`.

    Raises PresetError when there are none, PresetIntegrityError unless they hold exactly `variables`.
    """
    with _datasets(source) as found:
        missing = [v.path for v in variables if v.path not in found]
        left_over = sorted(set(found) - {v.path for v in variables})
        if missing or left_over:
            raise PresetIntegrityError(
                f"{source}: the weights must be those that config.json implies. Missing: {missing[:3]}; "
                f"not in the model: {left_over[:3]}"
            )
        dtypes = [_dtype(found[v.path], v, source) for v in variables]
        _write_safetensors(target, variables, dtypes, lambda v: v.convert(_values(found[v.path])))


def _write_safetensors(
    path: Path, variables: Sequence[Variable], dtypes: Sequence[str], read: Callable[[Variable], NDArray[Any]]
) -> None:
    """One tensor in memory at a time, which the safetensors library cannot."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for variable, dtype in zip(variables, dtypes, strict=True):
        begin, end = end, end + math.prod(variable.new_shape) * ITEM_BYTES[dtype]
        header[variable.name] = {"dtype": dtype, "shape": list(variable.new_shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for variable in variables:
            stream.write(read(variable).data)


@contextmanager
def _datasets(source: Path) -> Iterator[dict[str, Any]]:
    """Every array in the weight files by its path; what is not plain data is refused."""
    try:
        import h5py
    except ImportError as error:
        raise PresetError(f"KerasHub presets need h5py: pip install 's2s_ray[keras]'. Received: {source}") from error
    names = _files(source)
    absent = [name for name in names if not (source / name).is_file()]
    if absent:
        raise PresetError(f"{source} must hold {', '.join(absent)}, the weights of a KerasHub preset")
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        try:
            for name in names:
                file = stack.enter_context(h5py.File(source / name, "r"))
                _collect(h5py, file, "", found, source / name)
        except (OSError, RuntimeError, KeyError) as error:  # HDF5's own errors
            raise PresetIntegrityError(f"{source} must hold readable HDF5 files: {str(error)[:300]}") from error
        yield found


def _collect(h5py: Any, group: Any, prefix: str, found: dict[str, Any], file: Path) -> None:
    if prefix.count("/") > _MAX_GROUPS:
        raise PresetIntegrityError(f"{file} must not nest groups deeper than {_MAX_GROUPS}")
    for name in group:
        path = prefix + name
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise PresetIntegrityError(f"{file} must hold no links. Received: {path[:200]}")
        item = group[name]
        if isinstance(item, h5py.Group):
            _collect(h5py, item, path + "/", found, file)
        elif path in found or not isinstance(item, h5py.Dataset) or not _is_plain(h5py, item, file):
            raise PresetIntegrityError(f"{file}: {path[:200]} must be one array, stored once, whole and unfiltered")
        else:
            found[path] = item


def _is_plain(h5py: Any, item: Any, file: Path) -> bool:
    """Whether an array's bytes lie in this file, contiguous, as many as its shape needs."""
    layout = item.id.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count() or not item.shape:
        return False
    offset = item.id.get_offset()
    stored = item.id.get_storage_size() == item.nbytes
    return stored and offset is not None and offset + item.nbytes <= file.stat().st_size


def _dtype(item: Any, variable: Variable, source: Path) -> str:
    """safetensors' name of an array's dtype, once shape and dtype are what they must be."""
    if item.shape != variable.shape:
        raise PresetIntegrityError(
            f"{source}: {variable.path} must have shape {list(variable.shape)}. Received: {list(item.shape)}"
        )
    bfloat16 = item.dtype == np.dtype("V2") and item.attrs.get("dtype") == "bfloat16"  # as Keras marks it
    dtype = "BF16" if bfloat16 else _DTYPES.get(item.dtype.str)
    if dtype is None:
        raise PresetIntegrityError(
            f"{source}: {variable.path} must be float32, float16 or bfloat16 (KerasHub's quantised presets are not "
            f"read). Received: {item.dtype}"
        )
    return dtype


def _values(item: Any) -> NDArray[Any]:
    values: NDArray[Any] = item[()]
    return values.view("<u2") if values.dtype.kind == "V" else values


def _files(directory: Path) -> list[str]:
    """model.weights.h5, or the shards that the index names."""
    if not (directory / INDEX_FILE).is_file():
        return [SINGLE_FILE]
    weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
    groups = weight_map.values() if isinstance(weight_map, dict) else ()
    # a layer whose variables fell on both sides of a shard's end is in two files
    shards = [shard for group in groups for shard in (group if isinstance(group, list) else [group])]
    wrong = [shard for shard in shards if not (isinstance(shard, str) and SHARD.fullmatch(shard))]
    if wrong or not shards:
        raise PresetIntegrityError(
            f"{directory / INDEX_FILE} must name model_<5 digits>.weights.h5 beside it. Received: {str(wrong)[:200]}"
        )
    return sorted(set(shards))
