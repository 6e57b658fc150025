"""What KerasHub's families look like in Hugging Face's spelling: their config, and every variable's name and shape.

The layout of the weights is keras-hub 0.32's with Keras 3.15; keras-nlp 0.14 with Keras 3.5 wrote the same names.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from s2s_ray.errors import PresetError, UnsupportedModelError

_MAX_SIZE, _MAX_LAYERS = 2**24, 1024
_T5_CONSTANTS = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}
# "gated-gelu" means the tanh approximation in Hugging Face's T5; Keras' gelu is the exact one.
_T5_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_python", "gelu_approximate": "gelu_new", "silu": "silu"}


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in KerasHub's file and the tensor it becomes. `kernel`: how many leading axes are the input's."""

    path: str
    name: str
    shape: tuple[int, ...]
    kernel: int = 0

    @property
    def new_shape(self) -> tuple[int, ...]:
        if self.kernel:
            return math.prod(self.shape[self.kernel :]), math.prod(self.shape[: self.kernel])
        if self._offset:
            return self.shape[0] + self._offset, self.shape[1]
        return (math.prod(self.shape),) if self.name.endswith("bias") else self.shape

    @property
    def _offset(self) -> int:
        """Rows that Hugging Face's BART keeps before position 0."""
        return 2 if self.name.endswith("embed_positions.weight") else 0

    def convert(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of `shape` to contiguous ones of `new_shape`."""
        if self.kernel:
            values = values.reshape(self.new_shape[::-1]).T
        if self._offset:
            values = np.pad(values, ((self._offset, 0), (0, 0)))
        return np.ascontiguousarray(values).reshape(self.new_shape)


# Rows: KerasHub's layer, Hugging Face's module, axes of the weight ("input>output" for kernels, which are transposed),
# axes of the bias. Letters: D model, H heads, K size of a head, F feed-forward, P positions, V vocabulary, R buckets.
_Row = tuple[str, str, str, str]
_BART: tuple[_Row, ...] = (
    ("reversible_embedding", "model.shared", "V D", ""),
    ("position_embedding", "model.encoder.embed_positions", "P D", ""),
    ("position_embedding_1", "model.decoder.embed_positions", "P D", ""),
    ("layer_normalization", "model.encoder.layernorm_embedding", "D", "D"),
    ("layer_normalization_1", "model.decoder.layernorm_embedding", "D", "D"),
)
_BART_SELF_ATTENTION: tuple[_Row, ...] = (
    ("_self_attention_layer/query_dense", "self_attn.q_proj", "D>H K", "H K"),
    ("_self_attention_layer/key_dense", "self_attn.k_proj", "D>H K", "H K"),
    ("_self_attention_layer/value_dense", "self_attn.v_proj", "D>H K", "H K"),
    ("_self_attention_layer/output_dense", "self_attn.out_proj", "H K>D", "D"),
    ("_self_attention_layer_norm", "self_attn_layer_norm", "D", "D"),
)
_BART_CROSS_ATTENTION: tuple[_Row, ...] = tuple(
    (layer.replace("_self", "_cross"), module.replace("self_attn", "encoder_attn"), weight, bias)
    for layer, module, weight, bias in _BART_SELF_ATTENTION
)
_BART_FEEDFORWARD: tuple[_Row, ...] = (
    ("_feedforward_intermediate_dense", "fc1", "D>F", "F"),
    ("_feedforward_output_dense", "fc2", "F>D", "D"),
    ("_feedforward_layer_norm", "final_layer_norm", "D", "D"),
)
_T5: tuple[_Row, ...] = (
    ("reversible_embedding", "shared", "V D", ""),
    ("t5_layer_norm", "encoder.final_layer_norm", "D", ""),
    ("t5_layer_norm_1", "decoder.final_layer_norm", "D", ""),
)
_T5_SELF_ATTENTION: tuple[_Row, ...] = (
    ("self_attention/query_projector", "layer.0.SelfAttention.q", "D>A", ""),
    ("self_attention/key_projector", "layer.0.SelfAttention.k", "D>A", ""),
    ("self_attention/value_projector", "layer.0.SelfAttention.v", "D>A", ""),
    ("self_attention/output_projector", "layer.0.SelfAttention.o", "A>D", ""),
    ("self_attention_layer_norm", "layer.0.layer_norm", "D", ""),
)
_T5_CROSS_ATTENTION: tuple[_Row, ...] = tuple(
    (layer.replace("self", "cross"), module.replace("0.SelfAttention", "1.EncDecAttention").replace("0", "1"), w, b)
    for layer, module, w, b in _T5_SELF_ATTENTION
)
_T5_BUCKETS: _Row = ("self_attention", "layer.0.SelfAttention.relative_attention_bias", "R H", "")
_T5_FEEDFORWARD: tuple[_Row, ...] = (
    ("input_projector", "DenseReluDense.wi", "D>F", ""),
    ("output_projector", "DenseReluDense.wo", "F>D", ""),
    ("layer_norm", "layer_norm", "D", ""),
)


def _size(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key)
    value = default if value is None else value
    most = _MAX_LAYERS if key == "num_layers" else _MAX_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise PresetError(f"config.json: {key} must be a whole number from 1 to {most}. Received: {value!r}")
    return value


def _variables(rows: Sequence[_Row], layer: str, module: str, sizes: Mapping[str, int]) -> Iterator[Variable]:
    """The table's rows below a layer and a module; one or two variables each."""
    for ours, theirs, weight, bias in rows:
        for index, (axes, part) in enumerate(((weight, "weight"), (bias, "bias"))):
            if axes:
                kernel = len(axes.partition(">")[0].split()) if ">" in axes else 0
                shape = tuple(sizes[axis] for axis in axes.replace(">", " ").split())
                yield Variable(f"layers/{layer}{ours}/vars/{index}", f"{module}{theirs}.{part}", shape, kernel)


def _block(layer: str, index: int) -> str:
    """Keras numbers the layers of a class from the second on."""
    return f"{layer}_{index}/" if index else f"{layer}/"


def _bart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Variable]]:
    depth, heads, dim = (_size(settings, key) for key in ("num_layers", "num_heads", "hidden_dim"))
    if dim % heads:
        raise PresetError(f"config.json: hidden_dim must be a multiple of num_heads. Received: {dim} and {heads}")
    sizes = {"D": dim, "H": heads, "K": dim // heads, "F": _size(settings, "intermediate_dim")}
    sizes |= {"V": _size(settings, "vocabulary_size"), "P": _size(settings, "max_sequence_length")}
    variables = list(_variables(_BART, "", "", sizes))
    encoder, decoder = _BART_SELF_ATTENTION, _BART_SELF_ATTENTION + _BART_CROSS_ATTENTION
    for side, rows in (("encoder", encoder), ("decoder", decoder)):
        for index in range(depth):
            layer, module = _block(f"transformer_{side}", index), f"model.{side}.layers.{index}."
            variables += _variables(rows + _BART_FEEDFORWARD, layer, module, sizes)
    config: dict[str, Any] = {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "activation_function": "gelu",
    }
    config |= {"d_model": dim, "vocab_size": sizes["V"], "max_position_embeddings": sizes["P"]}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": depth, f"{side}_attention_heads": heads, f"{side}_ffn_dim": sizes["F"]}
    dropout = settings.get("dropout", 0.1)
    return config | {"dropout": dropout, "attention_dropout": dropout, "scale_embedding": False}, variables


def _t5(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[Variable]]:
    depth, heads, dim = (_size(settings, key) for key in ("num_layers", "num_heads", "hidden_dim"))
    key_dim, tied = _size(settings, "key_value_dim", dim // heads), settings.get("tie_embedding_weights", True)
    gated, activation = settings.get("use_gated_activation", True), _t5_activation(settings.get("activation", "relu"))
    sizes = {"D": dim, "H": heads, "A": heads * key_dim, "F": _size(settings, "intermediate_dim")}
    sizes |= {"V": _size(settings, "vocabulary_size"), "R": _T5_CONSTANTS["relative_attention_num_buckets"]}
    variables = list(_variables(_T5, "", "", sizes))
    if not tied:
        variables.append(Variable("layers/reversible_embedding/vars/1", "lm_head.weight", (dim, sizes["V"]), 1))
    gate = (("gate_projector", "DenseReluDense.wi_1", "D>F", ""),) if gated else ()
    feedforward = [*_T5_FEEDFORWARD, *gate]
    for number, side in enumerate(("encoder", "decoder")):
        attention = _T5_SELF_ATTENTION + _T5_CROSS_ATTENTION * number
        for index in range(depth):
            layer, module = _block("t5_transformer_layer", number * depth + index), f"{side}.block.{index}."
            variables += _variables((*attention, *((_T5_BUCKETS,) if index == 0 else ())), layer, module, sizes)
            variables += _variables(feedforward, layer, f"{module}layer.{number + 1}.", sizes)
    if gated:
        variables = [replace(v, name=v.name.replace(".wi.", ".wi_0.")) for v in variables]
    config: dict[str, Any] = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": sizes["V"],
    }
    config |= {"d_model": dim, "d_kv": key_dim, "d_ff": sizes["F"], "num_heads": heads}
    config |= {"num_layers": depth, "num_decoder_layers": depth, **_T5_CONSTANTS}
    config |= {"feed_forward_proj": f"gated-{activation}" if gated else activation}
    config |= {"dropout_rate": settings.get("dropout", 0.1), "tie_word_embeddings": bool(tied)}
    config |= {"scale_decoder_outputs": bool(tied), "layer_norm_epsilon": settings.get("layer_norm_epsilon", 1e-6)}
    return config, variables


def _t5_activation(value: Any) -> str:
    name = value.get("config") if isinstance(value, dict) else value  # a function is serialised as an object
    name = str(name).rpartition(">")[2]
    if name not in _T5_ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: activation must be one of {', '.join(_T5_ACTIVATIONS)}. Received: {str(value)[:200]}"
        )
    return _T5_ACTIVATIONS[name]


FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], tuple[dict[str, Any], list[Variable]]]] = {
    "BartBackbone": _bart,
    "T5Backbone": _t5,
}
