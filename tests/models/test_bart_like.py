"""What the families derived from BART do in fp16: overflow inside the encoder is clamped, as transformers does it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import M2M100Config, MBartConfig, PegasusConfig

from s2s_ray import models
from s2s_ray.models.loading import build_backbone
from s2s_ray.text.tokenizer import read_json_object
from tests.models.contract import reference_logits, reference_model, sources, teacher_forced
from tests.models.test_marian import SIZES


@pytest.mark.parametrize("family", [MBartConfig, PegasusConfig, M2M100Config])
def test_fp16_overflow_is_clamped_as_in_transformers(family: Any, tmp_path: Path) -> None:
    """Norms stand before the blocks here. Where they follow them an infinity becomes NaN, in transformers too."""
    model = reference_model(family(**(SIZES | {"decoder_start_token_id": 2})))
    with torch.no_grad():
        model.model.encoder.layers[0].fc2.weight *= 3e4
    model.save_pretrained(tmp_path)
    config = read_json_object(tmp_path / "config.json")
    ours = build_backbone(models.task_class(config["model_type"]).backbone_cls, config, tmp_path, dtype="float16")
    batch = teacher_forced(model.config, sources(model.config, 4))
    assert reference_logits(model, batch).isfinite().all()
    expected = reference_logits(model.half(), batch)
    with torch.no_grad():
        got = ours.eval()(batch)
    assert expected.isfinite().all()
    assert (got - expected).abs().max() <= 0.1
