from pathlib import Path
from typing import Any

import pytest
from transformers import UMT5Config

from s2s_ray.models.umt5 import UMT5Backbone
from tests.models.contract import check_family
from tests.models.test_t5 import SIZES, with_own_head


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_layers": 3}, id="bias-in-every-layer"),
        pytest.param(
            {"num_decoder_layers": 1, "num_heads": 3, "d_kv": 12, "feed_forward_proj": "gated-silu"},
            id="inner-width-36-of-32",
        ),
    ],
)
def test_umt5_is_transformers_umt5(changes: dict[str, Any], tmp_path: Path) -> None:
    check_family(UMT5Config(**(SIZES | changes)), tmp_path, stop_bias=2.0, adjust=with_own_head)


@pytest.mark.parametrize(
    ("written", "scaled"),
    [
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({}, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
    ],
)
def test_the_flag_says_whether_to_rescale(written: dict[str, Any], scaled: bool) -> None:
    assert UMT5Backbone.output_form(written) == (scaled, True)
