"""What jobs/presets.py does: presets from anywhere into directories and stores, and what they hold.

Every function returns the text to print. Only `import_preset` and `export_preset` need torch, and nothing needs ray.
"""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from s2s_ray import presets
from s2s_ray.errors import PresetIntegrityError
from s2s_ray.presets.handles import STORE_VARIABLE
from s2s_ray.presets.manifest import MANIFEST_FILE, is_preset_file
from s2s_ray.presets.saving import new_preset
from s2s_ray.presets.weights import INDEX_FILE, WeightFiles
from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor
from s2s_ray.text.tokenizer import read_json_object

# What config.json says of a model's size, in the spellings of the families.
_SIZES = (
    ("encoder_layers", "decoder_layers"),
    ("num_layers", "num_decoder_layers"),
    ("d_model",),
    ("encoder_ffn_dim", "d_ff"),
    ("encoder_attention_heads", "num_heads"),
    ("vocab_size",),
)


def list_presets(store: str | None) -> str:
    """The built-in names; of a store (default: the one S2S_RAY_STORE names) every name and its versions."""
    lines = [f"{name:24} {data['description']}" for name, data in presets.builtin_names().items()]
    url = store or os.environ.get(STORE_VARIABLE)
    if url:
        versions = presets.PresetStore(url).list()
        lines += ["", url, *(f"  {name}@{', '.join(map(str, numbers))}" for name, numbers in versions.items())]
    return "\n".join(lines)


def show_preset(handle: str) -> str:
    """Configuration, size, weights, languages and the model card of a preset."""
    found = presets.resolve(handle)
    return "\n".join([f"{handle}: {found.directory}", *_summary(found), "", *_card(found.directory)])


def _summary(found: presets.ResolvedPreset) -> Iterator[str]:
    config = read_json_object(found.directory / "config.json")
    files = WeightFiles.open(found.directory)
    preprocessor = Seq2SeqLMPreprocessor.from_directory(found.directory)
    sizes = [f"{key} {config[key]}" for keys in _SIZES for key in keys if isinstance(config.get(key), int)]
    parameters = sum(math.prod(info.shape) for info in files.tensors.values())
    dtypes = ", ".join(sorted({info.dtype for info in files.tensors.values()}))
    known = preprocessor.languages
    yield f"digest      {found.digest}"
    yield f"model       {config.get('model_type')}: {', '.join(sizes)}"
    yield f"weights     {parameters:,} values in {len(files.tensors)} tensors, {files.total_bytes:,} bytes, {dtypes}"
    yield f"tokenizer   {preprocessor.tokenizer.vocabulary_size()} tokens"
    yield f"lengths     source {preprocessor.encoder_sequence_length}, target {preprocessor.decoder_sequence_length}"
    yield f"languages   {', '.join(sorted(known.tokens)) if known else 'none of its own'}"


def _card(directory: Path) -> list[str]:
    card = directory / "README.md"
    return card.read_text(encoding="utf-8", errors="replace").splitlines() if card.is_file() else ["(no model card)"]


def verify_preset(handle: str, digest: str | None) -> str:
    """Every file against the manifest, safetensors headers to the byte, and the pinned digest if one is given.

    Raises PresetIntegrityError, also where there is neither manifest nor digest to compare with.
    """
    found = presets.resolve(handle, expected_digest=digest)
    if digest is None and not (found.directory / MANIFEST_FILE).is_file():
        raise PresetIntegrityError(
            f"{handle} must hold {MANIFEST_FILE}, or its digest be given with --digest. Its digest is {found.digest}"
        )
    files = WeightFiles.open(found.directory)
    return f"{handle} verifies: {len(files.tensors)} tensors, {files.total_bytes:,} bytes of weights\n{found.digest}"


def import_preset(handle: str, directory: str) -> str:
    """Copy a preset to a sealed directory that needs nothing else; weights byte for byte, the tokenizer converted.

    Raises PresetIntegrityError unless the weights are those that config.json implies.
    """
    from s2s_ray import models
    from s2s_ray.models.loading import check_weights

    source = presets.resolve(handle).directory
    config = read_json_object(source / "config.json")
    check_weights(models.task_class(config.get("model_type")).backbone_cls, config, source)
    weights = set(WeightFiles.open(source).files)
    with new_preset(Path(directory)) as target:
        for path in source.iterdir():
            unused = path.suffix == ".safetensors" and path.name not in weights
            if is_preset_file(path.name) and not unused and (path.name != INDEX_FILE or len(weights) > 1):
                shutil.copyfile(path, target / path.name)
        Seq2SeqLMPreprocessor.from_directory(target).save(target)
    return f"{directory}\n{presets.resolve(Path(directory)).digest}"


def export_preset(handle: str, directory: str, dtype: str | None) -> str:
    """Write a preset in the names and files that transformers itself writes; `dtype` as the weights have it."""
    from s2s_ray.seq2seq_lm import Seq2SeqLM

    source = presets.resolve(handle).directory
    if dtype is None:
        names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
        held = {info.dtype for info in WeightFiles.open(source).tensors.values()}
        dtype = names.get(held.pop()) if len(held) == 1 else None
    Seq2SeqLM.from_preset(source, dtype=dtype).save_to_preset(directory)
    return f"{directory}\n{presets.resolve(Path(directory)).digest}"


def publish_preset(handle: str, store: str, name: str, version: int | None) -> str:
    """Upload a preset to a store and give it the next version, or `version`."""
    found = presets.resolve(handle)
    published = presets.PresetStore(store).publish(found.directory, name, version=version)
    return f"{store.rstrip('/')}/{published}\n{found.digest}"
