from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig

from tests.models.contract import check_family, check_files


def config(**changes: Any) -> BartConfig:
    sizes = {
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
    return BartConfig(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 0.0, id="plain"),
        pytest.param({}, 3.0, id="ragged-output-and-logits-bias"),
        pytest.param({"encoder_layers": 3, "decoder_layers": 1}, 1.0, id="distilbart"),
        pytest.param({"scale_embedding": True, "activation_function": "relu"}, 3.0, id="scaled-relu"),
        pytest.param({"tie_word_embeddings": False, "activation_function": "gelu_new"}, 1.0, id="own-head"),
        pytest.param(
            {"encoder_attention_heads": 8, "decoder_attention_heads": 2, "decoder_ffn_dim": 40}, 2.0, id="heads"
        ),
    ],
)
def test_bart_is_transformers_bart(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(config(**changes), tmp_path, stop_bias=stop_bias)


@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_of_the_checkpoint_counts(tied: bool, tmp_path: Path) -> None:
    check_files(config(encoder_layers=1, decoder_layers=1, tie_word_embeddings=tied), tmp_path)
