"""Preset directories saved by KerasHub (BART, T5), converted once per node into what everything else reads.

    config.json  tokenizer.json   Keras' serialised objects (task.json, preprocessor.json, metadata.json add nothing)
    assets/tokenizer/             vocabulary.json and merges.txt (BART), vocabulary.spm (T5)
    model.weights.h5              or model.weights.json with model_00000.weights.h5 ...

The result is a Hugging Face directory in the node's cache (cache.py), so no other code knows of KerasHub. The same
source gives the same bytes, hence the same digest, on every node.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2s_ray.errors import PresetError, UnsupportedModelError
from s2s_ray.presets import cache
from s2s_ray.presets.keras_families import FAMILIES
from s2s_ray.presets.keras_weights import INDEX_FILE, SHARD, SINGLE_FILE, convert_weights
from s2s_ray.presets.manifest import refuse_links
from s2s_ray.storage import Location, canonical_json, sha256_bytes, sha256_file, strict_json
from s2s_ray.text.tokenizer import read_json_object

_CONVERSION = 1  # part of the cache's key: raise it when a source must give other files than before
_MAX_CONFIG_BYTES = 2**20
_ASSETS = "assets/tokenizer"
_FILES = {"config.json", "tokenizer.json", "README.md", SINGLE_FILE, INDEX_FILE}
_VOCABULARIES = {
    "bart": {"vocabulary.json": "vocab.json", "merges.txt": "merges.txt"},
    "t5": {"vocabulary.spm": "spiece.model"},
}


def is_keras(directory: Location) -> bool:
    """Whether config.json there is a serialised Keras object, which names a class and no `model_type`."""
    try:
        data = (directory / "config.json").read_bytes(_MAX_CONFIG_BYTES + 1)
    except OSError:
        return False  # whoever reads the directory next says what is wrong with it
    return len(data) <= _MAX_CONFIG_BYTES and _names_a_class(strict_json(data, f"{directory}/config.json", PresetError))


def _names_a_class(config: Any) -> bool:
    return isinstance(config, dict) and "model_type" not in config and {"class_name", "config"} <= set(config)


def resolve(source: Location) -> tuple[Path, str]:
    """(converted directory in the node's cache, its digest) of a KerasHub directory on any filesystem.

    Local files are hashed at each call, remote ones told by their etags. Raises PresetError or UnsupportedModelError
    for what cannot be converted, PresetIntegrityError for weights that are not what config.json says.
    """
    names = [name for name in source.list_names() if name in _FILES or SHARD.fullmatch(name)]
    assets = (source / _ASSETS).list_names()
    names += [f"{_ASSETS}/{name}" for name in assets if any(name in files for files in _VOCABULARIES.values())]

    if source.is_local:
        refuse_links(Path(source.path), names)

    def make(target: Path) -> None:
        if source.is_local:
            return convert(Path(source.path), target)
        with cache.temporary_directory() as copy:
            (copy / _ASSETS).mkdir(parents=True)
            for name in names:
                (source / name).download(copy / name)
            convert(copy, target)
        return None

    state = [[name, _identity(source / name)] for name in names]
    return cache.made_once(sha256_bytes(canonical_json([_CONVERSION, "keras", state])), make)


def _identity(file: Location) -> str:
    return sha256_file(Path(file.path)) if file.is_local else f"{file} {file.identity()}"


def convert(source: Path, target: Path) -> None:
    """Write the Hugging Face directory of a KerasHub one into the empty directory `target`. Errors: see `resolve`."""
    serialised = read_json_object(source / "config.json")
    name, settings = str(serialised.get("class_name")), serialised.get("config")
    if name not in FAMILIES or not isinstance(settings, dict):
        raise UnsupportedModelError(
            f"{source}: a KerasHub preset must hold one of {', '.join(FAMILIES)}. Received: {name[:200]!r}"
        )
    config, variables = FAMILIES[name](settings)
    _convert_preprocessor(source, target, config)
    convert_weights(source, target / "model.safetensors", variables)
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", target / "README.md")


def _convert_preprocessor(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """The configuration, the tokenizer and the lengths."""
    from s2s_ray.text.preprocessor import Seq2SeqLMPreprocessor

    vocabulary = _VOCABULARIES[config["model_type"]]
    missing = [name for name in vocabulary if not (source / _ASSETS / name).is_file()]
    if missing:
        raise PresetError(f"{source} must hold {', '.join(f'{_ASSETS}/{name}' for name in missing)}")
    for name, new_name in vocabulary.items():
        shutil.copyfile(source / _ASSETS / name, target / new_name)
    roles, forced = _special_tokens(target, config)
    (target / "config.json").write_bytes(canonical_json({**config, **roles}))
    (target / "generation_config.json").write_bytes(canonical_json({**roles, **forced}))
    settings = read_json_object(source / "tokenizer.json").get("config")
    prefix_space = isinstance(settings, dict) and settings.get("add_prefix_space") is True
    (target / "tokenizer_config.json").write_bytes(canonical_json({"add_prefix_space": prefix_space}))
    preprocessor = Seq2SeqLMPreprocessor.from_directory(target)  # KerasHub does not save the lengths
    for name in vocabulary.values():
        (target / name).unlink()
    preprocessor.save(target)


def _special_tokens(target: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """KerasHub's packers as ids: BART's decoder begins with [</s>, <s>], T5's with [<pad>]."""
    if config["model_type"] == "t5":
        return {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}, {}
    vocabulary = read_json_object(target / "vocab.json")
    start, end, pad = (vocabulary.get(token) for token in ("<s>", "</s>", "<pad>"))
    roles = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad, "decoder_start_token_id": end}
    return roles, {"forced_bos_token_id": start}
