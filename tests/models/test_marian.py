from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MarianConfig, PegasusConfig

from s2s_ray.errors import PresetError
from s2s_ray.models.loading import build_backbone
from s2s_ray.models.marian import MarianBackbone
from tests.models.contract import check_family, check_files, load_directory, reference_model

SIZES = {
    "vocab_size": 211,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
OPUS = {
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 150,
    "decoder_start_token_id": 150,
    "eos_token_id": 0,
}
TWO = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 160}


def config(**changes: Any) -> MarianConfig:
    return MarianConfig(**(SIZES | OPUS | changes))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 0.6, id="opus"),
        pytest.param({"tie_word_embeddings": False, "scale_embedding": False}, 2.5, id="own-head"),
        pytest.param(TWO, 5.0, id="two-vocabularies"),
        pytest.param(TWO | {"tie_word_embeddings": False}, 2.5, id="two-vocabularies-own-head"),
        pytest.param(
            {"d_model": 33, "encoder_attention_heads": 3, "decoder_attention_heads": 11, "decoder_layers": 1},
            3.0,
            id="odd-width",
        ),
    ],
)
def test_marian_is_transformers_marian(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(config(**changes), tmp_path, stop_bias=stop_bias)


@pytest.mark.parametrize(
    "changes", [{}, TWO, TWO | {"tie_word_embeddings": False}], ids=["tied", "two-vocabularies", "own-head"]
)
def test_every_tensor_of_the_checkpoint_counts(changes: dict[str, Any], tmp_path: Path) -> None:
    check_files(config(**changes, encoder_layers=1, decoder_layers=1), tmp_path)


@pytest.mark.parametrize("family", [MarianConfig, PegasusConfig])
def test_positions_are_computed_or_those_of_the_file(family: Any, tmp_path: Path) -> None:
    """Opus-MT's files hold the tables or not, as they are older or newer; transformers takes what is there."""
    model = reference_model(family(**(SIZES | {"vocab_size": 61, "pad_token_id": 1, "decoder_start_token_id": 1})))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    for name in names:
        tensors.pop(name, None)
    save_file(tensors, tmp_path / "model.safetensors")
    ours = load_directory(tmp_path)
    for name, position in zip(names, ("encoder_positions.weight", "decoder_positions.weight"), strict=True):
        assert torch.equal(ours.state_dict()[position], model.state_dict()[name])
    assert torch.equal(
        build_backbone(type(ours), ours.config, None).state_dict()["encoder_positions.weight"],
        ours.state_dict()["encoder_positions.weight"],
    )
    save_file(tensors | {names[0]: torch.ones(64, 32)}, tmp_path / "model.safetensors")
    assert torch.equal(load_directory(tmp_path).state_dict()["encoder_positions.weight"], torch.ones(64, 32))


def test_a_table_of_positions_has_a_limit() -> None:
    with pytest.raises(PresetError, match="max_position_embeddings must be a whole number from 1 to 65536"):
        build_backbone(MarianBackbone, config(max_position_embeddings=2**16 + 1).to_dict(), None)
