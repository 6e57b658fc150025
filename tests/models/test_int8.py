"""int8 of every family on a CPU: logits near fp32's, and decoding in which a row does not depend on its neighbours."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2s_ray.generation.cache import Cohort, DecoderCache
from s2s_ray.models.backbone import Backbone
from tests.models.contract import load_ours, padded, reference_model, sources, teacher_forced
from tests.models.test_precisions import FAMILIES


def cohort(ours: Backbone, rows: list[list[int]], pad: int) -> Cohort:
    """Rows encoded together."""
    ids, mask = padded(rows, pad)
    return ours.init_cache(ours.encode(ids, mask), mask)


def decoded(ours: Backbone, cohorts: list[Cohort], targets: Tensor) -> Tensor:
    """Logits `[N, T, V]` of generation's own steps, fed `targets` `[N, T]`."""
    cache = DecoderCache(cohorts)
    return torch.stack([ours.decode(column, cache) for column in targets.T], dim=1)[..., : ours.vocabulary_size]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_near_fp32_and_a_row_is_its_own(family: str, tmp_path: Path) -> None:
    config, adjust = FAMILIES[family]
    ours = load_ours(reference_model(config, adjust=adjust), tmp_path)
    rows, pad = sources(config, 6), config.pad_token_id
    targets = teacher_forced(config, rows)["decoder_token_ids"]
    ours.pack()
    exact = decoded(ours, [cohort(ours, rows, pad)], targets)
    ours.unpack()
    ours.quantization = "int8"
    ours.pack()
    found = decoded(ours, [cohort(ours, rows, pad)], targets)
    spread = exact.std(dim=-1).mean()
    assert 0 < (found - exact).abs().mean() < 0.1 * spread
    # One step over all rows or over each alone: bit for bit, as every row has a scale of its own.
    together = decoded(ours, [cohort(ours, [row], pad) for row in rows], targets)
    alone = [decoded(ours, [cohort(ours, [row], pad)], target[None]) for row, target in zip(rows, targets, strict=True)]
    assert torch.equal(together, torch.cat(alone))
    # Encoded with padding beside it, a row's fp32 attention sums in another order.
    assert (together - found).abs().mean() < 0.02 * spread
