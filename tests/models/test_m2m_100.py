from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import M2M100Config

from s2s_ray.errors import PresetError
from s2s_ray.generation.engine import Engine
from s2s_ray.models.loading import build_backbone
from s2s_ray.models.m2m_100 import M2M100Backbone
from tests.models.contract import (
    check_family,
    check_files,
    load_directory,
    load_ours,
    our_tokens,
    reference_logits,
    reference_model,
    reference_tokens,
    settings_of,
    sources,
    teacher_forced,
)
from tests.models.test_marian import SIZES


def config(**changes: Any) -> M2M100Config:
    return M2M100Config(**(SIZES | changes))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, -4.0, id="m2m"),
        pytest.param({"tie_word_embeddings": False, "scale_embedding": False}, 3.0, id="own-head"),
        pytest.param({"pad_token_id": 5, "decoder_start_token_id": 0}, -4.0, id="padding-5"),
        pytest.param(
            {"d_model": 33, "encoder_attention_heads": 3, "decoder_attention_heads": 11, "encoder_layers": 1},
            2.0,
            id="odd-width",
        ),
    ],
)
def test_m2m_100_is_transformers_m2m_100(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(config(**changes), tmp_path, stop_bias=stop_bias)


def test_every_tensor_of_the_checkpoint_counts(tmp_path: Path) -> None:
    check_files(config(encoder_layers=1, decoder_layers=1), tmp_path)


def test_positions_go_beyond_the_configs_and_padding_has_none(tmp_path: Path) -> None:
    """Padding's id inside a row: it is attended to, has no position, and what follows it counts on without it."""
    model = reference_model(config(max_position_embeddings=8, encoder_layers=1, decoder_layers=1))
    ours = load_ours(model, tmp_path)
    rows = sources(model.config, 4)
    assert max(map(len, rows)) > 20
    rows[0][2:2] = [1, 1]
    batch = teacher_forced(model.config, rows, length=20)
    with torch.no_grad():
        assert (ours(batch) - reference_logits(model, batch)).abs().max() <= 1e-4
    given = {"max_length": 20, "forced_bos_token_id": 7, "no_repeat_ngram_size": 2}
    assert our_tokens(Engine(ours), rows, settings_of(model.config, **given)) == reference_tokens(model, rows, **given)


def test_a_table_of_positions_in_a_file_is_ignored(tmp_path: Path) -> None:
    ours = load_ours(reference_model(config()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.encoder.embed_positions.weights"] = torch.ones(66, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_directory(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_padding_must_be_known() -> None:
    with pytest.raises(PresetError, match="pad_token_id must be a token id"):
        build_backbone(M2M100Backbone, config().to_dict() | {"pad_token_id": None}, None)
