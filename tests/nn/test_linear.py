"""Packed linear layers against torch's own, for every activation, shape of bias and number of fused layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2s_ray.nn.linear import ACTIVATIONS, pack_linear, pack_weight

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.05)]  # the packed fp32 product adds in another order


def layer(inputs: int, outputs: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def plain(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activations by their formulas."""
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return {"none": x, "relu": x.clamp(min=0), "silu": x * torch.sigmoid(x)}[name]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_what_their_names_say(name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), plain(name, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_packed_equals_plain(name: str, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    one = layer(24, 40, bias=bias).to(dtype)
    packed = pack_linear(one, activation=name)
    for rows in (1, 3, 17, 64):
        x = torch.randn(rows, 24, dtype=dtype)
        expected = plain(name, F.linear(x.float(), one.weight.float(), None if one.bias is None else one.bias.float()))
        found = packed(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_several_layers_fused_equal_each_by_itself(biases: tuple[bool, ...]) -> None:
    layers = [layer(16, 8 * (i + 1), bias=bias, seed=i) for i, bias in enumerate(biases)]
    x = torch.randn(9, 16)
    parts = pack_linear(*layers)(x).split([one.out_features for one in layers], dim=-1)
    for part, one in zip(parts, layers, strict=True):
        torch.testing.assert_close(part, one(x), rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_kept() -> None:
    one = layer(16, 6)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(pack_linear(one)(x), one(x), rtol=1e-5, atol=1e-5)
    assert pack_linear(one)(torch.randn(0, 16)).shape == (0, 6)


def test_a_slice_of_a_larger_tensor_is_read_right() -> None:
    """The engine hands over views: rows of a batch, chunks of a fused product."""
    one = layer(16, 6)
    wide = torch.randn(10, 48)
    for x in (wide[2:7, 16:32], wide[::2, :16], wide[:, :32:2]):
        torch.testing.assert_close(pack_linear(one)(x), F.linear(x.clone(), one.weight, one.bias), rtol=1e-5, atol=1e-5)


def test_a_weight_that_stands_alone() -> None:
    weight, bias, x = torch.randn(50, 16), torch.randn(50), torch.randn(4, 16)
    torch.testing.assert_close(pack_weight(weight, bias)(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pack_weight(weight, None)(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_packed_weights_do_not_follow_training_and_carry_no_gradient() -> None:
    one = layer(16, 6)
    x = torch.randn(4, 16)
    packed, before = pack_linear(one), one(x).detach()
    with torch.inference_mode():
        one.weight.data.zero_()
        torch.testing.assert_close(packed(x), before, rtol=1e-5, atol=1e-5)
    assert not packed(x).requires_grad
