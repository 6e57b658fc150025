"""KerasHub's BartSeq2SeqLM as a process: batches of token ids in on stdin, generated ids out, one JSON line each.

    KERAS_BACKEND=torch python -m tests.benchmarks.keras_hub_peer FOLDER float32 cpu 1

FOLDER holds a BART as transformers saves it; the number is that of beams. Keras imports much and takes the settings of
its process with it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.transformers import convert_bart
from safetensors.numpy import load_file


class _Weights:
    """What KerasHub's converter of BART asks of a loader."""

    def __init__(self, folder: Path) -> None:
        self._tensors = load_file(folder / "model.safetensors")

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Any = None) -> None:
        tensor = self._tensors[f"model.{hf_weight_key}"]
        keras_variable.assign(tensor if hook_fn is None else hook_fn(tensor, list(keras_variable.shape)))


def load(folder: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The task without a preprocessor, and the checkpoint's config."""
    keras.config.set_dtype_policy(dtype)
    config = json.loads((folder / "config.json").read_text())
    options = convert_bart.convert_backbone_config(config | {"num_hidden_layers": config["encoder_layers"]})
    backbone = keras_hub.models.BartBackbone(**options)
    convert_bart.convert_weights(backbone, _Weights(folder), config)
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor=None), config


def generate(task: Any, config: dict[str, Any], rows: list[list[int]], length: int) -> list[list[int]]:
    """New tokens of each row; what follows a row's end token is noise."""
    pad = config["pad_token_id"]
    width = max(map(len, rows))
    source = np.array([row + [pad] * (width - len(row)) for row in rows], "int32")
    target = np.full((len(rows), length), pad, "int32")
    target[:, 0] = config["decoder_start_token_id"]
    inputs = {
        "encoder_token_ids": source,
        "encoder_padding_mask": np.arange(width) < np.array([[len(row)] for row in rows]),
        "decoder_token_ids": target,
        "decoder_padding_mask": np.arange(length) < np.ones((len(rows), 1)),
    }
    made = task.generate(inputs, stop_token_ids=(config["eos_token_id"],))
    return np.asarray(made["decoder_token_ids"])[:, 1:].tolist()  # type: ignore[no-any-return]


def main() -> None:
    folder, dtype, device, beams = sys.argv[1:]
    with keras.device("gpu" if device == "cuda" else "cpu"):
        task, config = load(Path(folder), dtype)
        task.compile(sampler="greedy" if beams == "1" else keras_hub.samplers.BeamSampler(num_beams=int(beams)))
        for line in sys.stdin:
            question = json.loads(line)
            print(json.dumps(generate(task, config, **question)), flush=True)


if __name__ == "__main__":
    main()
