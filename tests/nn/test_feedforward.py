"""The feed-forward block against its formula, gated or not, packed or not."""

import pytest
import torch
from torch.nn import functional as F

from s2s_ray.nn.feedforward import FeedForward


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_feed_forward_is_its_formula(gated: bool, bias: bool) -> None:
    torch.manual_seed(0)
    block, x = FeedForward(16, 40, "gelu_tanh", bias=bias, gated=gated).eval(), torch.randn(2, 5, 16)
    first = F.gelu((block.gate or block.up)(x), approximate="tanh")
    expected = block.down(first * block.up(x) if gated else first)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    block.pack()
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    block.unpack()
    assert torch.equal(block(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_last_product_in_fp32_carries_what_fp16_cannot(packed: bool) -> None:
    block = FeedForward(8, 16, "relu", bias=False).half()
    block.down.float()
    for parameter in block.parameters():
        parameter.fill_(8.0)
    if packed:
        block.pack()
    found = block(torch.full((1, 8), 64.0, dtype=torch.float16))
    assert torch.equal(found, torch.full((1, 8), 8.0 * 16 * 8 * 8 * 64))  # 524,288: above 65,504


def test_dropout_only_while_training() -> None:
    block, x = FeedForward(16, 40, "relu", dropout=0.5, gated=True), torch.randn(4, 16)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
