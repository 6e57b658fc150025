from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LongT5Config

from s2s_ray.errors import PresetError, UnsupportedModelError
from s2s_ray.models.loading import build_backbone
from s2s_ray.models.longt5 import LongT5Backbone
from tests.models.contract import (
    check_family,
    check_files,
    load_ours,
    reference_logits,
    reference_model,
    sources,
    teacher_forced,
)
from tests.models.test_t5 import SIZES, lively

# Windows of seven tokens and sums of three, so that sources of up to 41 tokens have many of both.
LONG = SIZES | {"local_radius": 6, "global_block_size": 4}
GLOBAL = {"encoder_attention_type": "transient-global"}


@pytest.mark.parametrize(
    ("changes", "stop_bias"),
    [
        pytest.param({}, 0.0, id="local"),
        pytest.param(GLOBAL | {"feed_forward_proj": "gated-gelu", "num_layers": 3}, 2.0, id="transient-global"),
        pytest.param(GLOBAL | {"tie_word_embeddings": False, "global_block_size": 16}, 0.0, id="unscaled-long-sums"),
    ],
)
def test_longt5_is_transformers_longt5(changes: dict[str, Any], stop_bias: float, tmp_path: Path) -> None:
    check_family(LongT5Config(**(LONG | changes)), tmp_path, stop_bias=stop_bias, adjust=lively)


@pytest.mark.parametrize("changes", [{}, GLOBAL], ids=["local", "transient-global"])
def test_every_tensor_of_a_file_counts(changes: dict[str, Any], tmp_path: Path) -> None:
    check_files(LongT5Config(**(LONG | changes | {"num_layers": 1})), tmp_path, adjust=lively)


@torch.no_grad()
def test_the_released_models_windows(tmp_path: Path) -> None:
    """Radius 127, sums of 16: a source of 600 tokens beside one of 20 and one without a whole sum."""
    model = reference_model(LongT5Config(**(SIZES | GLOBAL | {"num_decoder_layers": 1})), adjust=lively)
    ours = load_ours(model, tmp_path)
    rows = [[*row[:-1] * 40, 1][-n:] for row, n in zip(sources(model.config, 3, longest=60), (600, 20, 5), strict=True)]
    batch = teacher_forced(model.config, rows)
    assert (ours(batch) - reference_logits(model, batch)).abs().max() <= 1e-4


def test_a_far_token_counts_through_the_sums_alone(tmp_path: Path) -> None:
    changed = {}
    for kind in ("local", "transient-global"):
        ours = load_ours(reference_model(LongT5Config(**(LONG | {"encoder_attention_type": kind}))), tmp_path / kind)
        ids = torch.randint(4, 200, (1, 80))
        with torch.no_grad():
            first, second = (ours.encode(x, torch.ones_like(x, dtype=torch.bool)) for x in (ids, ids.clone().fill_(9)))
            again = ids.clone()
            again[:, 0] = 9
            changed[kind] = (ours.encode(again, torch.ones_like(ids, dtype=torch.bool)) - first)[:, 40:].abs().max()
        assert not torch.allclose(first, second)
    assert changed["local"] == 0 < changed["transient-global"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder_attention_type": "sparse"}, UnsupportedModelError, "one of local, transient-global"),
        ({"encoder_attention_type": ["local"]}, UnsupportedModelError, "one of local, transient-global"),
        ({"local_radius": 0}, PresetError, "local_radius must be a whole number"),
        ({**GLOBAL, "global_block_size": 0.5}, PresetError, "global_block_size must be a whole number"),
    ],
)
def test_config_values_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_backbone(LongT5Backbone, LongT5Config(**LONG).to_dict() | change, None)
