from pathlib import Path
from typing import Any

import pytest
from transformers import MBartConfig

from tests.models.contract import check_family, check_files
from tests.models.test_marian import SIZES


def config(**changes: Any) -> MBartConfig:
    return MBartConfig(**(SIZES | {"scale_embedding": True, "decoder_start_token_id": 2} | changes))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 2.5, id="mbart-50"),
        pytest.param({"decoder_start_token_id": 200, "scale_embedding": False}, 1.5, id="started-by-a-language"),
        pytest.param({"tie_word_embeddings": False, "activation_function": "relu"}, 2.5, id="own-head"),
        pytest.param(
            {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 40}, 4.0, id="depths", marks=pytest.mark.full
        ),
    ],
)
def test_mbart_is_transformers_mbart(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(config(**changes), tmp_path, stop_bias=stop_bias)


def test_every_tensor_of_the_checkpoint_counts(tmp_path: Path) -> None:
    check_files(config(encoder_layers=1, decoder_layers=1), tmp_path)
