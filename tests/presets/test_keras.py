"""KerasHub directories: what keras-hub computed (keras_hub/make.py) is what we compute, and nothing else is read."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest
import torch

from s2s_ray import Seq2SeqLM, presets
from s2s_ray.errors import PresetError, PresetIntegrityError, UnsupportedModelError
from s2s_ray.presets.weights import WeightFiles

FIXTURES = Path(__file__).parent / "keras_hub"
FAMILIES = ["bart", "t5", "t5_1.1"]
QUERY = "layers/transformer_encoder/_self_attention_layer/query_dense/vars/0"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keras_hub")
    for path in FIXTURES.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(root / path.stem)
    return root


@pytest.fixture
def preset(unpacked: Path, tmp_path: Path) -> Path:
    """A copy of BART's directory to spoil."""
    return Path(shutil.copytree(unpacked / "bart" / "preset", tmp_path / "preset"))


def logits_of(task: Seq2SeqLM, want: dict[str, Any]) -> Any:
    names = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids")
    task.backbone.eval()
    with torch.no_grad():
        return task({name: want[name] for name in names}).float().numpy()[:, : want["logits"].shape[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts_are_keras_hubs(unpacked: Path, family: str, tmp_path: Path) -> None:
    want = dict(np.load(unpacked / family / "expected.npz"))
    task = Seq2SeqLM.from_preset(unpacked / family / "preset")
    real = want["decoder_padding_mask"][:, : want["logits"].shape[1]].astype(bool)
    logits = logits_of(
        task, want
    )  # of the weights as they are: generation packs them, and packed products round otherwise
    assert np.abs(logits - want["logits"])[real].max() < 1e-4
    sources, length = want["sources"].tolist(), int(want["max_length"])
    assert [str(task.preprocessor.tokenizer(text)) for text in sources] == want["token_ids"].tolist()
    task.compile(sampler="greedy")
    assert task.generate(sources, max_length=length) == want["generated"].tolist()
    prompted = {"encoder_text": sources, "decoder_text": want["prompts"].tolist()}
    assert task.generate(prompted, max_length=length) == want["continued"].tolist()
    ids = task.generate(task.preprocessor.generate_preprocess(sources), max_length=length, stop_token_ids=None)
    assert np.array_equal(ids["decoder_token_ids"], want["unstopped"])
    task.save_to_preset(tmp_path / "saved")
    assert np.array_equal(logits_of(Seq2SeqLM.from_preset(tmp_path / "saved"), want), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_it_becomes(unpacked: Path, family: str) -> None:
    from transformers import AutoModelForSeq2SeqLM

    want = dict(np.load(unpacked / family / "expected.npz"))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(presets.resolve(unpacked / family / "preset").directory).eval()
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.as_tensor(want["encoder_token_ids"]).long(),
            attention_mask=torch.as_tensor(want["encoder_padding_mask"]).long(),
            decoder_input_ids=torch.as_tensor(want["decoder_token_ids"]).long(),
        ).logits.numpy()[:, : want["logits"].shape[1]]
    real = want["decoder_padding_mask"][:, : want["logits"].shape[1]].astype(bool)
    assert np.abs(logits - want["logits"])[real].max() < 1e-4


def test_shards_give_the_same_preset(unpacked: Path, preset: Path) -> None:
    whole = presets.resolve(preset)
    (preset / "model.weights.h5").unlink()
    for path in (unpacked / "bart" / "sharded").iterdir():
        shutil.copy(path, preset)
    assert len(list(preset.glob("model_*.weights.h5"))) > 1
    assert presets.resolve(preset).digest == whole.digest


def test_one_conversion_for_one_content(preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = presets.resolve(preset)
    assert presets.resolve(preset, expected_digest=first.digest).directory == first.directory
    before = (first.directory / "model.safetensors").stat().st_mtime_ns
    moved = presets.resolve(shutil.move(preset, tmp_path / "moved"))
    assert moved.digest == first.digest and (moved.directory / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setenv("S2S_RAY_CACHE", str(tmp_path / "another node"))
    elsewhere = presets.resolve(tmp_path / "moved")
    assert elsewhere.digest == first.digest and elsewhere.directory != first.directory
    assert {p.name for p in first.directory.iterdir()} == {
        "config.json", "generation_config.json", "manifest.json", "model.safetensors", "preprocessor.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_a_url_of_a_keras_hub_directory(preset: Path) -> None:
    fsspec.filesystem("memory").put(str(preset), "/keras_hub_bart", recursive=True)
    found = presets.resolve("memory://keras_hub_bart")
    assert found.digest == presets.resolve(preset).digest
    fsspec.filesystem("memory").rm("/keras_hub_bart", recursive=True)
    assert presets.resolve("memory://keras_hub_bart", expected_digest=found.digest).directory == found.directory


@pytest.mark.parametrize("code", ["f2", "bfloat16"])
def test_half_precision(preset: Path, code: str) -> None:
    whole = presets.resolve(preset).directory
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        values = file[QUERY][()]
        del file[QUERY]
        if code == "bfloat16":  # as Keras stores what numpy has no name for
            file[QUERY] = (values.view("<u4") >> 16).astype("<u2").view("V2")
            file[QUERY].attrs["dtype"] = "bfloat16"
        else:
            file[QUERY] = values.astype(code)
    half = presets.resolve(preset).directory
    name = "model.encoder.layers.0.self_attn.q_proj.weight"
    assert WeightFiles.open(half).tensors[name].dtype == ("BF16" if code == "bfloat16" else "F16")
    weight, exact = (Seq2SeqLM.from_preset(path).backbone.state_dict() for path in (half, whole))
    ours = "encoder_layers.0.self_attention.query.weight"
    assert torch.allclose(weight[ours], exact[ours], rtol=2**-7, atol=2**-12) and not torch.equal(
        weight[ours], exact[ours]
    )


def test_bfloat16_as_keras_hub_saves_it(unpacked: Path, tmp_path: Path) -> None:
    preset = shutil.copytree(unpacked / "t5_1.1" / "preset", tmp_path / "preset")
    exact = Seq2SeqLM.from_preset(preset).backbone.state_dict()
    shutil.copy(unpacked / "t5_1.1" / "bfloat16" / "model.weights.h5", preset)
    half = Seq2SeqLM.from_preset(preset).backbone.state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16().float()) for name, tensor in exact.items())


Spoil = Callable[[h5py.File], Any]


def _replaced(**options: Any) -> Spoil:
    def spoil(file: h5py.File) -> None:
        values = file[QUERY][()]
        del file[QUERY]
        file.create_dataset(QUERY, data=values, **options)

    return spoil


def _unwritten(shape: tuple[int, ...], **options: Any) -> Spoil:
    def spoil(file: h5py.File) -> None:
        del file[QUERY]
        file.create_dataset(QUERY, shape=shape, dtype="f4", **options)

    return spoil


def _linked(link: Any) -> Spoil:
    def spoil(file: h5py.File) -> None:
        del file[QUERY]
        file[QUERY] = link

    return spoil


def _virtual(file: h5py.File) -> None:
    del file[QUERY]
    layout = h5py.VirtualLayout((8, 2, 4), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (8, 2, 4))
    file.create_virtual_dataset(QUERY, layout)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unwritten((8, 2, 4)), "one array, stored once, whole"),
        (_unwritten((2**20, 2**20, 2**10), chunks=(1, 1, 1024)), "one array, stored once, whole"),
        (_unwritten((8, 2, 4), external=[("/etc/hostname", 0, 256)]), "one array, stored once, whole"),
        (_replaced(compression="gzip"), "whole and unfiltered"),
        (_replaced(chunks=(1, 2, 4)), "whole and unfiltered"),
        (_replaced(dtype="f8"), "float32, float16 or bfloat16"),
        (_replaced(dtype="i4"), "float32, float16 or bfloat16"),
        (_replaced(dtype=">f4"), "float32, float16 or bfloat16"),
        (_linked(h5py.SoftLink("/layers")), "must hold no links"),
        (_linked(h5py.ExternalLink("other.h5", "/x")), "must hold no links"),
        (_virtual, "one array, stored once, whole"),
        (lambda file: file.pop(QUERY), "Missing: \\['layers/transformer_encoder/_self"),
        (lambda file: file.create_dataset("layers/new/vars/0", data=[1.0]), "not in the model: \\['layers/new"),
        (lambda file: file.move(QUERY, QUERY[:-1] + "7"), "Missing"),
        (lambda file: file.__setitem__("layers/loop", file["layers"]), "nest groups|not in the model|stored once"),
    ],
)  # fmt: skip
def test_weights_that_are_not_plain_arrays_are_refused(preset: Path, spoil: Spoil, message: str) -> None:
    with h5py.File(preset / "model.weights.h5", "r+") as file:
        spoil(file)
    with pytest.raises(PresetIntegrityError, match=message):
        presets.resolve(preset)


def test_shapes_are_those_of_the_config(preset: Path) -> None:
    config = json.loads((preset / "config.json").read_text())
    config["config"]["intermediate_dim"] = 2**24
    (preset / "config.json").write_text(json.dumps(config))
    with pytest.raises(PresetIntegrityError, match=r"must have shape \[8, 16777216\]. Received: \[8, 12\]"):
        presets.resolve(preset)


def test_damaged_files_are_refused(preset: Path) -> None:
    path = preset / "model.weights.h5"
    good = path.read_bytes()
    for damaged in (b"", good[:100], good[: len(good) // 2], b"x" * len(good)):
        path.write_bytes(damaged)
        with pytest.raises(PresetIntegrityError, match="readable HDF5"):
            presets.resolve(preset)
    path.unlink()
    with pytest.raises(PresetError, match=r"must hold model\.weights\.h5"):
        presets.resolve(preset)


@pytest.mark.parametrize("shard", ["../model_00000.weights.h5", "/etc/passwd", "model_0.weights.h5", 7, None])
def test_shards_lie_beside_their_index(preset: Path, shard: Any) -> None:
    (preset / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers": shard}}))
    with pytest.raises(PresetIntegrityError, match=r"must name model_<5 digits>"):
        presets.resolve(preset)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 0, "num_layers must be a whole number"),
        ("num_layers", 2**24, "num_layers must be a whole number from 1 to 1024"),
        ("num_layers", True, "num_layers must be a whole number"),
        ("hidden_dim", "8", "hidden_dim must be a whole number"),
        ("num_heads", 3, "hidden_dim must be a multiple"),
        ("num_layers", 3, "the weights must be those that config.json implies"),
        ("vocabulary_size", None, "vocabulary_size must be a whole number"),
    ],
)
def test_settings_are_checked(preset: Path, key: str, value: Any, message: str) -> None:
    config = json.loads((preset / "config.json").read_text())
    config["config"][key] = value
    (preset / "config.json").write_text(json.dumps(config))
    with pytest.raises(PresetError, match=message):
        presets.resolve(preset)


def test_other_classes_list_the_known_ones(preset: Path) -> None:
    (preset / "config.json").write_text('{"class_name": "WhisperBackbone", "config": {}}')
    with pytest.raises(UnsupportedModelError, match=r"one of BartBackbone, T5Backbone\. Received: 'WhisperBackbone'"):
        presets.resolve(preset)


@pytest.mark.parametrize("name", ["model.weights.h5", "assets", "assets/tokenizer/merges.txt", "README.md"])
def test_links_out_of_the_directory_are_refused(preset: Path, tmp_path: Path, name: str) -> None:
    (preset / "README.md").write_text("# Card")
    (preset / name).rename(tmp_path / "outside")
    (preset / name).symlink_to(tmp_path / "outside")
    with pytest.raises(PresetIntegrityError, match="a link to"):
        presets.resolve(preset)


def test_a_missing_vocabulary_is_named(preset: Path) -> None:
    (preset / "assets" / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(PresetError, match=r"must hold assets/tokenizer/merges\.txt"):
        presets.resolve(preset)


@pytest.mark.parametrize(("module", "handle"), [("h5py", "PRESET"), ("kagglehub", "kaggle://keras/bart/keras/x")])
def test_a_missing_extra_is_named(preset: Path, module: str, handle: str) -> None:
    code = (
        "import sys; from s2s_ray import presets; from s2s_ray.errors import PresetError\n"
        f"sys.modules[{module!r}] = None\n"
        "try:\n    presets.resolve(sys.argv[1])\nexcept PresetError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, handle.replace("PRESET", str(preset))]
    assert "pip install 's2s_ray[keras]'" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
