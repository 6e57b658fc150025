"""Reading model configuration: strict types, errors that name the key. No torch here."""

from collections.abc import Mapping
from typing import Any

from s2s_ray.errors import PresetError, UnsupportedModelError

_MAX_DIMENSION = 2**24

# What Hugging Face's config files call the activations of nn/linear.py.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


def integer(config: Mapping[str, Any], key: str, *, most: int = _MAX_DIMENSION) -> int:
    """A size from the config. Raises PresetError when it is missing or not a whole number from 1 to `most`."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise PresetError(f"config.json: {key} must be a whole number from 1 to {most}. Received: {value!r}")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A real number from the config, `default` when the key is missing. Raises PresetError for anything else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise PresetError(f"config.json: {key} must be a number. Received: {value!r:.200}")
    return float(value)


def activation(config: Mapping[str, Any], key: str) -> str:
    """The name in nn/linear.py of the config's activation. Raises UnsupportedModelError for one not known."""
    value = config.get(key, "gelu")
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise UnsupportedModelError(f"config.json: {key} must be one of {known}. Received: {value!r:.200}")
    return _ACTIVATIONS[value]
