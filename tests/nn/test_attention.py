"""Attention: the whole-sequence path, the projections that generation uses, and packed weights all agree."""

import pytest
import torch
from torch.nn import functional as F

from s2s_ray.nn.attention import Attention

B, S, T, H, K = 3, 7, 5, 4, 8
D = H * K


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def attention(request: pytest.FixtureRequest) -> Attention:
    torch.manual_seed(0)
    return Attention(D, H, bias=request.param).eval()


def by_hand(attention: Attention, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Multi-head attention as in Vaswani et al. 2017, from the projections, one head at a time."""
    query, (key, value) = attention.project_query(x), attention.project_memory(memory)
    heads = []
    for head in range(H):
        part = slice(head * K, (head + 1) * K)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / K**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        heads.append(scores.softmax(dim=-1) @ value[..., part])
    return attention.output(torch.cat(heads, dim=-1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_self_attention(attention: Attention, packed: bool) -> None:
    x = torch.randn(B, T, D)
    expected = attention(x), attention(x, causal=True)
    if packed:
        attention.pack(cross=False)
        query, key, value = attention.project(x)
        close(query, attention.query(x))
        close(key, attention.key(x))
        close(value, attention.value(x))
    close(attention(x), expected[0])
    close(attention(x, causal=True), expected[1])
    attention.unpack()
    close(expected[0], by_hand(attention, x, x, None))
    close(expected[1], by_hand(attention, x, x, torch.ones(T, T).tril().bool()))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_cross_attention(attention: Attention, packed: bool) -> None:
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    mask = torch.arange(S) < torch.tensor([7, 4, 1])[:, None]
    expected = attention(x, memory, mask=mask[:, None, None])
    if packed:
        attention.pack(cross=True)
        key, value = attention.project_memory(memory)
        close(key, attention.key(memory))
        close(value, attention.value(memory))
        close(attention.project_query(x), attention.query(x))
    close(attention(x, memory, mask=mask[:, None, None]), expected)
    close(by_hand(attention, x, memory, mask[:, None]), expected)


@torch.no_grad()
def test_what_is_masked_does_not_matter(attention: Attention) -> None:
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    mask = (torch.arange(S) < 4).expand(B, S)[:, None, None]
    changed = memory.clone()
    changed[:, 4:] = torch.randn(B, S - 4, D) * 100
    close(attention(x, changed, mask=mask), attention(x, memory, mask=mask))
    close(attention(x, memory[:, :4]), attention(x, memory, mask=mask))
    assert not torch.allclose(attention(x, changed), attention(x, memory), atol=1e-2)


@torch.no_grad()
def test_causal_attention_does_not_look_ahead(attention: Attention) -> None:
    x = torch.randn(B, T, D)
    changed = x.clone()
    changed[:, 3:] += 10
    close(attention(changed, causal=True)[:, :3], attention(x, causal=True)[:, :3])


@torch.no_grad()
def test_one_token_at_a_time_equals_the_whole(attention: Attention) -> None:
    """What the cache does: project each new position, attend over all earlier ones."""
    x = torch.randn(B, T, D)
    whole = attention(x, causal=True)
    attention.pack(cross=False)
    keys, values = [], []
    for step in range(T):
        query, key, value = attention.project(x[:, step])
        keys.append(key)
        values.append(value)
        split = [t.view(B, -1, H, K).transpose(1, 2) for t in (query, torch.stack(keys, 1), torch.stack(values, 1))]
        heads = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(B, D)
        close(attention.output(heads), whole[:, step])


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_own_inner_width_scale_and_position_bias(packed: bool) -> None:
    """T5's form: three heads of 12 in a width of 32, scores unscaled, a bias for every head."""
    torch.manual_seed(0)
    attention = Attention(D, 3, head_dim=12, scale=1.0, bias=False).eval()
    x, bias = torch.randn(B, T, D), torch.randn(1, 3, T, T)
    query, key, value = (t.view(B, T, 3, 12).transpose(1, 2) for t in attention.project(x))
    weights = (query @ key.transpose(2, 3) + bias).softmax(dim=-1)
    expected = attention.out((weights @ value).transpose(1, 2).reshape(B, T, 36))
    if packed:
        attention.pack(cross=False)
    close(attention(x, mask=bias), expected)


def test_packed_attention_is_dropped_by_unpack_and_trains() -> None:
    torch.manual_seed(0)
    attention = Attention(D, H)
    attention.pack(cross=False)
    with torch.no_grad():
        attention.value.weight.zero_()
    x = torch.randn(B, T, D)
    constant = attention.out(attention.value.bias).expand(B, T, D)  # what values of zero weight give
    assert not torch.allclose(attention(x), constant, atol=1e-3)  # still the packed copy
    attention.unpack()
    close(attention(x), constant)
    attention(x).sum().backward()
    assert attention.query.weight.grad is not None


def test_dropout_only_while_training() -> None:
    torch.manual_seed(0)
    attention = Attention(D, H, dropout=0.5)
    x = torch.randn(B, T, D)
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))
