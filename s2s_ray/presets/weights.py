"""What a preset's safetensors files hold, read from their headers alone.

The safetensors library accepts duplicate keys; this reader refuses whatever the format
(https://huggingface.co/docs/safetensors) does not allow, before a byte of a tensor is read or allocated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets.manifest import is_preset_file
from s2s_ray.storage import Location, strict_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = (
    16 * 2**20
)  # safetensors allows 100 MB, which as Python objects is gigabytes; 10,000 tensors are 1 MB
CONVERT_COMMAND = (
    'python -c "from transformers import AutoModelForSeq2SeqLM as M, AutoTokenizer as T; import sys; '
    '[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for c in (M, T)]" SOURCE TARGET'
)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_SCAN_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file: safetensors' dtype name, shape, and where its bytes lie, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All tensors of a preset by name, one file or shards alike."""

    directory: Path
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> "WeightFiles":
        """Raises PresetError when there are no safetensors, PresetIntegrityError when they are damaged."""
        if (directory / SINGLE_FILE).exists():
            return cls(directory, _read_header(directory / SINGLE_FILE))
        if (directory / INDEX_FILE).exists():
            return cls(directory, _read_shards(directory))
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
        raise PresetError(
            f"a preset must hold {SINGLE_FILE} or {INDEX_FILE}. Received: {directory} with "
            f"{', '.join(pickles[:5]) or 'no weights'}. Pickled weights (pytorch_model.bin) are never read: they can "
            f"run code: if you trust them, convert with {CONVERT_COMMAND}"
        )

    @property
    def files(self) -> list[str]:
        """The files' names, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def total_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def nonfinite(self) -> list[str]:
        """Names of the floating-point tensors that hold a NaN or an infinity. Reads everything once."""
        return [name for name, info in self.tensors.items() if _has_nonfinite(self.directory / info.file, info)]


def _read_shards(directory: Path) -> dict[str, TensorInfo]:
    path = directory / INDEX_FILE
    index = strict_json(Location.parse(path).read_bytes(MAX_HEADER_BYTES), str(path), PresetIntegrityError)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PresetIntegrityError(f"{path} must hold a weight_map")
    for file in weight_map.values():
        if not (isinstance(file, str) and is_preset_file(file) and file.endswith(".safetensors")):
            raise PresetIntegrityError(f"{path} must name .safetensors files beside it. Received: {str(file)[:200]!r}")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise PresetIntegrityError(f"{directory} must hold {file}, which {INDEX_FILE} names")
        tensors.update(_read_header(directory / file, weight_map))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise PresetIntegrityError(
            f"the shards in {directory} must hold every tensor of the index. Missing: {missing[:5]}"
        )
    return tensors


def _read_header(path: Path, weight_map: Mapping[str, str] | None = None) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise PresetIntegrityError(f"{path} is no complete safetensors file: {size} bytes, header of {length}")
        header = strict_json(stream.read(length), f"the header of {path}", PresetIntegrityError)
    if not isinstance(header, dict):
        raise PresetIntegrityError(f"the header of {path} must be an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PresetIntegrityError(f"the __metadata__ of {path} must map strings to strings")
    tensors = {name: _tensor(name, value, path, 8 + length) for name, value in header.items()}
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise PresetIntegrityError(
                f"tensor {name!r} in {path} must begin at byte {position}. Received: {info.begin}"
            )
        position = info.end
    if position != size:
        raise PresetIntegrityError(f"{path} must have {position} bytes as its header says. Received: {size}")
    strays = [] if weight_map is None else [name for name in tensors if weight_map.get(name) != path.name]
    if strays:
        raise PresetIntegrityError(f"the index must place every tensor of {path.name} there. It does not: {strays[:5]}")
    return tensors


def _tensor(name: str, value: Any, path: Path, base: int) -> TensorInfo:
    what = f"tensor {name[:200]!r} in {path}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise PresetIntegrityError(f"{what} must have dtype, shape and data_offsets. Received: {str(value)[:200]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise PresetIntegrityError(f"{what} must have one of the dtypes {', '.join(ITEM_BYTES)}. Received: {dtype!r}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise PresetIntegrityError(f"{what} must have whole numbers as shape and offsets. Received: {str(value)[:200]}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise PresetIntegrityError(f"{what} must have as many bytes as its shape needs. Received: {str(value)[:200]}")
    return TensorInfo(dtype, tuple(shape), path.name, base + offsets[0], base + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _has_nonfinite(path: Path, info: TensorInfo) -> bool:
    import numpy as np

    if info.dtype not in FLOAT_DTYPES:
        return False
    with path.open("rb") as stream:
        stream.seek(info.begin)
        for start in range(info.begin, info.end, _SCAN_BYTES):
            data = stream.read(min(_SCAN_BYTES, info.end - start))
            if info.dtype == "BF16":  # numpy has no bfloat16: its exponent bits are all ones
                bad = bool(((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80).any())
            else:
                bad = not bool(np.isfinite(np.frombuffer(data, f"<f{ITEM_BYTES[info.dtype]}")).all())
            if bad:
                return True
    return False
