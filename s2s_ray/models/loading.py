"""Weights between a preset directory's safetensors and a backbone, by name, shape and dtype; nothing is guessed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from s2s_ray.errors import PresetIntegrityError, SettingsError
from s2s_ray.jsonio import canonical_json
from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.positions import SinusoidalPositions
from s2s_ray.presets.weights import FLOAT_DTYPES, WeightFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_BYTES = 5 * 10**9
_LAYER_COUNTS = ("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A torch dtype from its name or itself; None means float32. Raises SettingsError."""
    if dtype is None:
        return torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise SettingsError(f"dtype must be one of {', '.join(DTYPES)}. Received: {dtype!r}")
    return found


def build_backbone(
    cls: type[Backbone],
    config: Mapping[str, Any],
    directory: Path | None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Backbone:
    """A backbone with the weights of `directory`, or randomly initialised when that is None.

    The checkpoint's names and shapes are compared with the model's before any memory is allocated for it. Raises
    PresetIntegrityError when a parameter is missing, left over, or of another shape.
    """
    target = torch.device(device or "cpu")
    if directory is None:
        backbone = cls(config)
        initialise(backbone, float(config.get("init_std", 0.02)))
        backbone.cast(resolve_dtype(dtype))
        return backbone.to(device=target)
    backbone, files, sources = _planned(cls, config, directory)
    backbone.cast(resolve_dtype(dtype))
    backbone.to_empty(device=target)
    _fill(backbone, files, sources)
    return backbone


def check_weights(cls: type[Backbone], config: Mapping[str, Any], directory: Path) -> None:
    """Raises PresetIntegrityError unless the weights of `directory` are those that `config` implies."""
    _planned(cls, config, directory)


def _planned(
    cls: type[Backbone], config: Mapping[str, Any], directory: Path
) -> tuple[Backbone, WeightFiles, dict[str, str | None]]:
    """A backbone without memory, and which tensor of the checkpoint each of its tensors takes."""
    files = WeightFiles.open(directory)
    for key in _LAYER_COUNTS:  # even without memory a layer takes time
        if isinstance(layers := config.get(key), int) and layers > len(files.tensors):
            raise PresetIntegrityError(
                f"{directory}: config.json: {key} is {layers}, but the weights hold {len(files.tensors)} tensors in all"
            )
    with torch.device("meta"):
        backbone = cls(config)
    return backbone, files, _match(backbone, files)


def initialise(backbone: nn.Module, std: float) -> None:
    """Draw every matrix from N(0, std**2), as the families' papers do; norms start at one, biases at zero."""
    for module in backbone.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _match(backbone: Backbone, files: WeightFiles) -> dict[str, str | None]:
    """For each of our tensors the checkpoint's name of it (None: optional and absent)."""
    sources: dict[str, str | None] = {}
    used = set(_spellings(files, backbone.checkpoint_ignored))
    for ours, tensor in backbone.state_dict().items():
        name = backbone.checkpoint_name(ours)
        aliases = _spellings(files, (name, *backbone.aliases(name)))
        found = next((alias for alias in aliases if alias in files.tensors), None)
        used.update(aliases)
        if found is None and ours not in backbone.optional_parameters:
            raise PresetIntegrityError(f"{files.directory}: the weights must hold {name}; it is missing")
        if found is not None and tuple(files.tensors[found].shape) != tuple(tensor.shape):
            wrong = list(files.tensors[found].shape)
            raise PresetIntegrityError(
                f"{files.directory}: {found} must have shape {list(tensor.shape)}. Received: {wrong}"
            )
        if found is not None and files.tensors[found].dtype not in FLOAT_DTYPES:
            raise PresetIntegrityError(
                f"{files.directory}: {found} must have one of the dtypes {', '.join(FLOAT_DTYPES)}. "
                f"Received: {files.tensors[found].dtype}"
            )
        sources[ours] = found
    _check_repeats(backbone, files, sources)
    left_over = sorted(set(files.tensors) - used)
    if left_over:
        raise PresetIntegrityError(f"{files.directory}: nothing in the model takes {', '.join(left_over[:5])}")
    return sources


def _spellings(files: WeightFiles, names: Iterable[str]) -> tuple[str, ...]:
    """The names, and if the weights were saved from the network without its task, the same without their first part."""
    bare = not any(name.startswith("model.") for name in files.tensors)
    return (*names, *(name.removeprefix("model.") for name in names)) if bare else tuple(names)


def _check_repeats(backbone: Backbone, files: WeightFiles, sources: Mapping[str, str | None]) -> None:
    """Tensors that the model shares must be equal where the checkpoint holds several copies of them."""
    taken = set(sources.values())
    for ours, found in sources.items():
        aliases = backbone.aliases(backbone.checkpoint_name(ours))
        for alias in _spellings(files, aliases):
            if found is None or alias in taken or alias not in files.tensors:
                continue
            if not torch.equal(_read(files, found), _read(files, alias)):
                raise PresetIntegrityError(
                    f"{files.directory}: config.json ties {found} and {alias}, but the two differ: "
                    "set tie_word_embeddings to false if they are meant to"
                )


def _read(files: WeightFiles, name: str) -> Tensor:
    with safe_open(files.directory / files.tensors[name].file, framework="pt") as handle:
        return handle.get_tensor(name)


@torch.no_grad()
def _fill(backbone: Backbone, files: WeightFiles, sources: Mapping[str, str | None]) -> None:
    state = backbone.state_dict()
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for ours, found in sources.items():
        if found is None:
            owner = backbone.get_submodule(ours.rpartition(".")[0])
            if isinstance(owner, SinusoidalPositions):
                owner.reset()
            else:
                state[ours].zero_()
        else:
            by_file.setdefault(files.directory / files.tensors[found].file, []).append((ours, found))
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as handle:
            for ours, found in names:
                state[ours].copy_(handle.get_tensor(found))


def save_weights(backbone: Backbone, directory: Path, *, max_shard_bytes: int = _SHARD_BYTES) -> None:
    """Write the weights in Hugging Face's names: `model.safetensors`, or shards with their index above
    `max_shard_bytes`.
    """
    tensors = {backbone.checkpoint_name(n): t.detach().cpu().contiguous() for n, t in backbone.state_dict().items()}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (directory / "model.safetensors.index.json").write_bytes(canonical_json(index))
