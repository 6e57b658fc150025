"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trainable products beside frozen linear layers; PEFT's files.

Dimensions: R rank.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.errors import PresetIntegrityError, SettingsError, UnsupportedModelError
from s2s_ray.jsonio import strict_json

if TYPE_CHECKING:
    from s2s_ray.models.backbone import Backbone

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SIDES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # ours and PEFT's
# What PEFT may add to plain LoRA; each changes the result.
_REFUSED = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
            "fan_in_fan_out", "lora_bias", "trainable_token_indices", "layer_replication")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """`rank` R of the products, scaled by `alpha` / R; `dropout` of their input.

    `targets` are last parts of linear layers' names, ours or the checkpoint's: "query", "value", "up"; "q_proj", "fc1".
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise SettingsError(f"the rank of LoRA must be a whole number of at least 1. Received: {self.rank!r}")
        if not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise SettingsError(
                f"LoRA's alpha must be above 0 and dropout from 0 to below 1. Received: {self.alpha}, {self.dropout}"
            )


class LoraLinear(nn.Linear):
    """A linear layer whose weight and bias are frozen, plus `scaling * B A x`: lora_a `[R, in]`, lora_b `[out, R]`.

    B starts at zero, so that training starts from the layer as it was.
    """

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scaling = settings.alpha / settings.rank
        self.dropout = settings.dropout
        self.lora_a = nn.Parameter(base.weight.new_empty(settings.rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, settings.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as PEFT

    def merged_weight(self) -> Tensor:
        """The weight `[out, in]` of a plain layer that computes the same."""
        return self.weight + self.scaling * self.lora_b @ self.lora_a

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` to `[..., out]`."""
        product = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scaling * product


def add_lora(backbone: "Backbone", settings: LoraSettings, *, seed: int = 0) -> None:
    """Freeze the backbone and put LoRA beside every layer that `targets` names; A is drawn from `seed`.

    Raises SettingsError for a target that names no linear layer.
    """
    backbone.unpack()
    backbone.requires_grad_(False)
    linears = [(name, module) for name, module in backbone.named_modules() if type(module) is nn.Linear]
    found = {name: (module, {name.rpartition(".")[2], _hub_name(backbone, name).rpartition(".")[2]})
             for name, module in linears}  # fmt: skip
    known = sorted(set().union(*(names for _, names in found.values())) - {"lm_head"})
    missing = [target for target in settings.targets if target not in known]
    if missing or not settings.targets:
        raise SettingsError(f"LoRA's targets must be of {', '.join(known)}. Received: {', '.join(missing) or 'none'}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (module, names) in found.items():
            if names & set(settings.targets):
                _replace(backbone, name, LoraLinear(module, settings))


def lora_layers(backbone: nn.Module) -> dict[str, LoraLinear]:
    """The layers with LoRA, by name."""
    return {name: module for name, module in backbone.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge_lora(backbone: "Backbone") -> None:
    """Add the products to the weights: plain linear layers that compute the same."""
    backbone.unpack()
    for name, layer in lora_layers(backbone).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.merged_weight())
        plain.bias = layer.bias
        _replace(backbone, name, plain)
    backbone.requires_grad_(True)


def save_adapter(backbone: "Backbone", settings: LoraSettings, directory: Path) -> None:
    """Write the LoRA weights as PEFT does, into an existing directory."""
    layers = lora_layers(backbone)
    tensors = {
        key: getattr(layers[name], side).detach().cpu().contiguous() for name, side, key in _keys(backbone, layers)
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": sorted({_hub_name(backbone, name).rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def load_adapter(backbone: "Backbone", directory: Path) -> LoraSettings:
    """Put a PEFT adapter beside the backbone's layers; returns its settings.

    Raises PresetIntegrityError for missing or unexpected tensors, UnsupportedModelError for what is not plain LoRA.
    """
    path = directory / CONFIG_FILE
    config: dict[str, Any] = strict_json(path.read_bytes(), str(path), PresetIntegrityError)
    settings = _settings(config, path)
    add_lora(backbone, settings)
    layers = lora_layers(backbone)
    tensors = load_file(directory / WEIGHTS_FILE)
    keys = {key: getattr(layers[name], side) for name, side, key in _keys(backbone, layers)}
    shapes = {key: tuple(tensor.shape) for key, tensor in keys.items()}
    received = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != received:
        differing = sorted(key for key in {*shapes, *received} if shapes.get(key) != received.get(key))
        raise PresetIntegrityError(
            f"{directory} must hold LoRA weights for {', '.join(settings.targets)} of this model. Missing, unexpected "
            f"or of another shape: {', '.join(differing[:5])}"
        )
    for key, parameter in keys.items():
        parameter.copy_(tensors[key])
    return settings


def _settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    used = [name for name in _REFUSED if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        raise UnsupportedModelError(
            f"{path} must be of plain LoRA without biases. Received: peft_type {config.get('peft_type')!r}, bias "
            f"{config.get('bias')!r}, {', '.join(used) or 'nothing else'}"
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UnsupportedModelError(f"{path}: target_modules must be a list of names. Received: {targets!r}")
    return LoraSettings(
        rank=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=tuple(target.rpartition(".")[2] for target in targets),
    )


def _keys(backbone: "Backbone", layers: Mapping[str, LoraLinear]) -> Iterator[tuple[str, str, str]]:
    """(our layer, our side, PEFT's key) of every LoRA tensor."""
    for name in layers:
        for ours, theirs in _SIDES.items():
            yield name, ours, f"base_model.model.{_hub_name(backbone, name)}.{theirs}"


def _hub_name(backbone: "Backbone", name: str) -> str:
    return backbone.checkpoint_name(f"{name}.weight").removesuffix(".weight")


def _replace(backbone: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module.train(backbone.training)
    setattr(backbone.get_submodule(parent), last, module)
