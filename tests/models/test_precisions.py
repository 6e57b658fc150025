"""bfloat16 and float16 of every family from one fp32 preset: computed as in transformers, saved as the same weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    LongT5Config,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    T5Config,
    UMT5Config,
)

from s2s_ray import models
from s2s_ray.generation.engine import Engine
from s2s_ray.models.backbone import Backbone
from s2s_ray.models.loading import build_backbone, save_weights
from s2s_ray.text.tokenizer import read_json_object
from tests.models.contract import (
    our_tokens,
    reference_logits,
    reference_model,
    same_in_transformers,
    settings_of,
    sources,
    teacher_forced,
    vary_norms_and_biases,
)
from tests.models.test_longt5 import GLOBAL, LONG
from tests.models.test_marian import OPUS, SIZES, TWO
from tests.models.test_t5 import SIZES as T5_SIZES
from tests.models.test_t5 import T5_1_1, lively, with_own_head

FAMILIES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "bart": (BartConfig(**SIZES), vary_norms_and_biases),
    "marian": (MarianConfig(**(SIZES | OPUS)), vary_norms_and_biases),
    "marian-two": (MarianConfig(**(SIZES | OPUS | TWO)), vary_norms_and_biases),
    "mbart": (MBartConfig(**SIZES, decoder_start_token_id=2), vary_norms_and_biases),
    "pegasus": (PegasusConfig(**SIZES), vary_norms_and_biases),
    "m2m_100": (M2M100Config(**SIZES), vary_norms_and_biases),
    "t5": (T5Config(**T5_SIZES), lively),
    "t5-own-head": (T5Config(**T5_SIZES, **T5_1_1), with_own_head),
    "mt5": (MT5Config(**T5_SIZES), with_own_head),
    "umt5": (UMT5Config(**T5_SIZES), with_own_head),
    "longt5": (LongT5Config(**LONG, **GLOBAL), lively),
}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The fp32 directory of a family."""
    root = tmp_path_factory.mktemp("fp32")

    def get(family: str) -> Path:
        if not (root / family).is_dir():
            config, adjust = FAMILIES[family]
            reference_model(config, adjust=adjust).save_pretrained(root / family)
        return root / family

    return get


def load(directory: Path, dtype: str) -> Backbone:
    config = read_json_object(directory / "config.json")
    return build_backbone(models.task_class(config["model_type"]).backbone_cls, config, directory, dtype=dtype).eval()


def fp32_names(named: Any) -> set[str]:
    return {name for name, parameter in named if parameter.dtype == torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_transformers(preset: Callable[[str], Path], tmp_path: Path, family: str, dtype: str) -> None:
    directory = preset(family)
    theirs: Any = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=dtype).eval()
    ours = load(directory, dtype)
    own = {ours.checkpoint_name(name) for name in fp32_names(ours.named_parameters())}
    assert own == fp32_names(theirs.named_parameters())
    keeps = re.match("u?m?t5", family) is not None  # T5's rule: the last products stay in fp32
    assert bool(own) is (keeps and dtype == "float16")
    batch = teacher_forced(theirs.config, sources(theirs.config, 6))
    exact, expected = load(directory, "float32")(batch), reference_logits(theirs, batch).float()
    rounding = (expected - exact).abs().mean()
    assert 0 < rounding < 0.1 * exact.std()
    # LongT5's scores are rounded there between the steps of its attention, and not here.
    near, share = (exact, 1.5) if family == "longt5" else (expected, 0.6)
    assert (ours(batch).float() - near).abs().mean() < share * rounding
    rows = sources(theirs.config, 3)
    our_tokens(Engine(ours), rows, settings_of(theirs.config, max_length=8, num_beams=2))
    assert (ours(batch).float() - near).abs().mean() < share * rounding  # packed by now
    save_weights(ours, tmp_path, max_shard_bytes=10_000)
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    same_in_transformers(theirs, tmp_path)
    again = load(tmp_path, dtype).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())
