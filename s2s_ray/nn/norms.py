"""Norms that torch lacks in the form the families compute."""

import torch
from torch import Tensor, nn

from s2s_ray import kernels
from s2s_ray.kernels import cpu


class RMSNorm(nn.Module):
    """T5's norm: scales by the root mean square (in fp32) and a learned weight; subtracts no mean, adds no bias.

    The result has the weight's dtype and is rounded to it before the weight is applied; torch's own rounds once, after.
    """

    def __init__(self, hidden_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]` to `[..., D]`."""
        variance = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


def add_norm(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x + y)`, x and y `[..., D]`; one kernel where there is one and no gradient is asked for."""
    if torch.is_grad_enabled() or not isinstance(norm, nn.LayerNorm) or not x.dtype == y.dtype == norm.weight.dtype:
        return norm(x + y)
    if x.device.type == "cpu" and x.dtype == torch.float32 and cpu.library() is not None:
        return cpu.add_norm(x, y, norm)
    kernel = kernels.load("norms", x.device)
    if kernel is None:
        return norm(x + y)
    with torch.cuda.device(x.device):
        return kernel.add_norm(x.contiguous(), y.contiguous(), norm)
