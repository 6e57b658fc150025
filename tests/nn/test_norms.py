import torch

from s2s_ray.nn.norms import RMSNorm


@torch.no_grad()
def test_rms_norm_is_its_formula() -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, 1e-6), torch.randn(5, 24) * 10 + 3
    norm.weight.copy_(torch.randn(24))
    for row, found in zip(x, norm(x), strict=True):
        expected = norm.weight * row / (row.pow(2).sum() / 24 + 1e-6).sqrt()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_squares_beyond_half_precision_do_not_overflow() -> None:
    x = torch.full((1, 8), 60_000.0)
    assert torch.equal(RMSNorm(8, 1e-6).half()(x.half()), torch.ones(1, 8, dtype=torch.float16))


@torch.no_grad()
def test_an_fp32_input_comes_out_in_the_weights_dtype() -> None:
    """The residual stream of T5 in fp16, whose last product is kept in fp32."""
    assert RMSNorm(8, 1e-6).half()(torch.randn(2, 8)).dtype == torch.float16
