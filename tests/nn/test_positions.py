"""Sinusoids against transformers' tables; T5's relative bias against its buckets, and its own table."""

import pytest
import torch
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from s2s_ray.nn.positions import RelativeBias, SinusoidalPositions, UnboundedSinusoids

H = 3


def bias_of(buckets: int, distance: int, causal: bool) -> RelativeBias:
    torch.manual_seed(0)
    return RelativeBias(buckets, H, distance, causal=causal)


@torch.no_grad()
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 16), (10, 300), (4, 5)])
@pytest.mark.parametrize("causal", [False, True], ids=["both-directions", "causal"])
def test_every_offset_has_transformers_bucket(buckets: int, distance: int, causal: bool) -> None:
    bias, length = bias_of(buckets, distance, causal), 400
    positions = torch.arange(length)
    offsets = positions[None, :] - positions[:, None]
    found = T5Attention._relative_position_bucket(offsets, not causal, buckets, distance)
    expected = bias.weight[found].permute(2, 0, 1)[None]
    if causal:
        expected = expected.masked_fill(offsets > 0, float("-inf"))
    assert torch.equal(bias(length), expected)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 90])
def test_the_table_holds_every_row_of_the_matrix(length: int) -> None:
    bias = bias_of(16, 64, causal=True)
    table, matrix = bias.table(), bias(length)
    assert table.shape == (H, 65)
    for query in range(length):
        for key in range(query + 1):
            assert torch.equal(table[:, min(query - key, 64)], matrix[0, :, query, key])


def test_every_use_of_a_bucket_adds_to_its_gradient() -> None:
    bias = bias_of(8, 16, causal=False)
    bias(5).sum().backward()
    assert bias.weight.grad is not None
    assert torch.equal(bias.weight.grad.sum(dim=0), torch.full((H,), 25.0))


@pytest.mark.parametrize("width", [16, 17])
def test_marians_table_is_transformers(width: int) -> None:
    ours = SinusoidalPositions(512, width)
    assert torch.equal(ours.weight, MarianSinusoidalPositionalEmbedding(512, width).create_weight())
    assert torch.equal(ours(torch.tensor([[3, 511]])), ours.weight[[3, 511]][None])


@pytest.mark.parametrize("width", [16, 17])
def test_unbounded_sinusoids_are_transformers(width: int) -> None:
    theirs = M2M100SinusoidalPositionalEmbedding.get_embedding(1000, width, padding_idx=1)
    assert (UnboundedSinusoids(width, offset=2)(torch.arange(998)) - theirs[2:]).abs().max() <= 1e-6
