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
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype:
            kernel = kernels.load("norms", x.device)
            if kernel is not None:
                with torch.cuda.device(x.device):
                    return kernel.rms_norm(x.contiguous(), self.weight, self.eps)
        variance = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


def add_norm(x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
    """`norm(x + y)` within range, x and y `[..., D]`; one kernel where there is one and no gradient is asked for."""
    if torch.is_grad_enabled() or not isinstance(norm, nn.LayerNorm) or not x.dtype == y.dtype == norm.weight.dtype:
        return clamp_overflow(norm(x + y))
    if x.device.type == "cpu" and x.dtype == torch.float32 and cpu.library() is not None:
        return cpu.add_norm(x, y, norm)
    kernel = kernels.load("norms", x.device)
    if kernel is None:
        return clamp_overflow(norm(x + y))
    with torch.cuda.device(x.device):
        return kernel.add_norm(x.contiguous(), y.contiguous(), norm)


def clamp_overflow(x: Tensor) -> Tensor:
    """Bring fp16 infinities back into range, as transformers does after T5's blocks and BART's encoder layers."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)
