from pathlib import Path
from typing import Any

import pytest
from transformers import PegasusConfig

from tests.models.contract import check_family, check_files
from tests.models.test_marian import SIZES


def config(**changes: Any) -> PegasusConfig:
    return PegasusConfig(**(SIZES | {"scale_embedding": True, "activation_function": "relu"} | changes))


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 4.0, id="pegasus"),
        pytest.param({"tie_word_embeddings": False, "scale_embedding": False}, 7.0, id="own-head"),
        pytest.param(
            {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 40}, 2.5, id="depths", marks=pytest.mark.full
        ),
    ],
)
def test_pegasus_is_transformers_pegasus(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(config(**changes), tmp_path, stop_bias=stop_bias)


def test_every_tensor_of_the_checkpoint_counts(tmp_path: Path) -> None:
    check_files(config(encoder_layers=1, decoder_layers=1), tmp_path)
