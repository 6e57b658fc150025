from pathlib import Path
from typing import Any

import pytest
from transformers import MT5Config

from s2s_ray.models.mt5 import MT5Backbone
from tests.models.contract import check_family
from tests.models.test_t5 import SIZES, with_own_head


def test_mt5_is_transformers_mt5(tmp_path: Path) -> None:
    check_family(MT5Config(**SIZES), tmp_path, stop_bias=2.0, adjust=with_own_head)


@pytest.mark.parametrize(
    ("written", "scaled"),
    [
        ({"tie_word_embeddings": False, "transformers_version": "4.57.3"}, False),
        ({"tie_word_embeddings": True, "transformers_version": "4.57.3"}, True),
        ({"transformers_version": "4.10.0"}, False),
        ({"tie_word_embeddings": True, "transformers_version": "5.23.0"}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
def test_the_flag_is_read_as_its_writer_meant_it(written: dict[str, Any], scaled: bool) -> None:
    assert MT5Backbone.output_form(written) == (scaled, not scaled)
