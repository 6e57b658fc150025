"""Safetensors headers: what is read equals the library's view, and what is damaged is refused."""

import json
import random
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from s2s_ray.errors import PresetError, PresetIntegrityError
from s2s_ray.presets.manifest import seal, verified_manifest
from s2s_ray.presets.weights import WeightFiles


def write(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_header_equals_the_library(tiny_bart_dir: Path) -> None:
    files = WeightFiles.open(tiny_bart_dir)
    tensors = load_file(tiny_bart_dir / "model.safetensors")
    data = (tiny_bart_dir / "model.safetensors").read_bytes()
    assert set(files.tensors) == set(tensors)
    for name, info in files.tensors.items():
        assert (info.shape, info.dtype, info.file) == (tensors[name].shape, "F32", "model.safetensors")
        assert data[info.begin : info.end] == tensors[name].tobytes()
    assert files.total_bytes == sum(t.nbytes for t in tensors.values())
    assert files.nonfinite() == []


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    a, b = {"x": np.ones((2, 3), np.float32)}, {"y": np.zeros(4, np.float16)}
    save_file(a, tmp_path / "model-00001-of-00002.safetensors")
    save_file(b, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_shards(sharded: Path) -> None:
    files = WeightFiles.open(sharded)
    assert {n: (i.shape, i.dtype) for n, i in files.tensors.items()} == {"x": ((2, 3), "F32"), "y": ((4,), "F16")}
    assert files.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"x": "../model-00001-of-00002.safetensors"},
        {"x": "/etc/passwd"},
        {"x": "sub/x.safetensors"},
        {"x": "config.json"},
        {"x": 3},
        {"x": "model-00002-of-00002.safetensors"},
        {"x": "model-00003-of-00003.safetensors"},
        {"z": "model-00001-of-00002.safetensors"},
    ],
)
def test_a_wrong_index_is_refused(sharded: Path, change: dict[str, Any]) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(change)
    path.write_text(json.dumps(index))
    with pytest.raises(PresetIntegrityError):
        WeightFiles.open(sharded)


def test_a_tensor_the_index_leaves_out_is_refused(sharded: Path) -> None:
    save_file({"x": np.ones(1), "extra": np.ones(1)}, sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(PresetIntegrityError, match="extra"):
        WeightFiles.open(sharded)


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (entry(), b"\0" * 7),
        (entry(), b"\0" * 9),
        (entry(shape=[3]), b"\0" * 8),
        (entry(shape=[-2]), b"\0" * 8),
        (entry(shape=[True, 2]), b"\0" * 8),
        (entry(shape=[2.0]), b"\0" * 8),
        (entry(shape=[2**40, 2**40]), b"\0" * 8),
        (entry(dtype="F128"), b"\0" * 8),
        (entry(dtype=["F32"]), b"\0" * 8),
        (entry(data_offsets=[8, 0]), b"\0" * 8),
        (entry(data_offsets=[4, 12]), b"\0" * 12),
        (entry(data_offsets=[-8, 0]), b"\0" * 8),
        (entry(data_offsets=[0, 8, 16]), b"\0" * 8),
        (entry(extra=1), b"\0" * 8),
        (entry() | {"__metadata__": None}, b"\0" * 8),
        (entry() | {"__metadata__": {"format": 1}}, b"\0" * 8),
        (entry() | {"y": entry()["x"]}, b"\0" * 8),
        (
            b'{"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
            b"1234",
        ),
        (b"[]", b""),
        (b"\xff\xff", b""),
        (b"[" * 100_000, b""),
        (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(PresetIntegrityError):
        WeightFiles.open(tmp_path)


def test_truncations_and_bit_flips_of_sealed_weights_are_refused(tiny_bart_dir: Path, tmp_path: Path) -> None:
    """P16: 50 truncations and 200 flipped bits; truncations are found even without a manifest."""
    directory = Path(shutil.copytree(tiny_bart_dir, tmp_path / "p"))
    seal(directory)
    path = directory / "model.safetensors"
    good = path.read_bytes()
    seed = 20240607
    rng = random.Random(seed)
    for length in [0, 7, 8, len(good) - 1, *(rng.randrange(len(good)) for _ in range(46))]:
        path.write_bytes(good[:length])
        with pytest.raises(PresetIntegrityError):
            WeightFiles.open(directory)
        with pytest.raises(PresetIntegrityError):
            verified_manifest(directory)
    for _ in range(200):
        damaged = bytearray(good)
        position = rng.randrange(len(good)) if rng.random() < 0.7 else rng.randrange(2000)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(PresetIntegrityError):
            verified_manifest(directory)
            pytest.fail(f"accepted: byte {position}, seed {seed}")
    assert PresetIntegrityError.exit_code == 7


def test_nonfinite_tensors_are_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    bad = {
        f"{d}-{v}": torch.tensor([1.0, float(v)]).to(d)
        for d in (torch.float16, torch.bfloat16, torch.float64)
        for v in ("nan", "inf", "-inf")
    }
    good = {f"{d}": torch.tensor([torch.finfo(d).max, -0.0, 1.0], dtype=d) for d in (torch.float32, torch.bfloat16)}
    save_torch(bad | good | {"ints": torch.tensor([2**31 - 1])}, tmp_path / "model.safetensors")
    assert set(WeightFiles.open(tmp_path).nonfinite()) == set(bad)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(PresetError, match=rf"{name}\. Pickled weights .* are never read.*convert with python -c"):
        WeightFiles.open(tmp_path)


def test_the_command_in_the_error_converts_a_pickle(tiny_bart_dir: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    source = shutil.copytree(tiny_bart_dir, tmp_path / "source")
    tensors = load_torch(source / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(PresetError) as raised:
        WeightFiles.open(source)
    command = shlex.split(str(raised.value).partition("convert with ")[2])
    assert command[0] == "python" and command[-2:] == ["SOURCE", "TARGET"]
    subprocess.run([sys.executable, *command[1:-2], str(source), str(tmp_path / "target")], check=True)
    converted = load_torch(tmp_path / "target" / "model.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in converted.items())
    assert WeightFiles.open(tmp_path / "target").total_bytes


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, 17 * 2**20])
def test_a_huge_header_is_not_read(tmp_path: Path, length: int) -> None:
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", length))
        stream.truncate(18 * 2**20)  # sparse
    with pytest.raises(PresetIntegrityError, match="no complete safetensors file"):
        WeightFiles.open(tmp_path)


def test_a_shard_that_leads_out_of_the_directory_is_refused(sharded: Path, tmp_path_factory: Any) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.symlink_to(shard.rename(tmp_path_factory.mktemp("outside") / shard.name))
    with pytest.raises(PresetIntegrityError, match="a link to"):
        verified_manifest(sharded)
