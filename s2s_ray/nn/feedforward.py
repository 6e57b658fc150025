"""The position-wise feed-forward block."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray import kernels
from s2s_ray.nn.linear import ACTIVATIONS, Projection, pack_linear


class FeedForward(nn.Module):
    """`[..., D] -> [..., intermediate] -> [..., D]` with an activation and its dropout in between.

    `gated` multiplies the product `up` with an activated product `gate` (arXiv:2002.05202).
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        activation: str,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.gate = nn.Linear(hidden_dim, intermediate_dim, bias=bias) if gated else None
        self.up = nn.Linear(hidden_dim, intermediate_dim, bias=bias)
        self.down = nn.Linear(intermediate_dim, hidden_dim, bias=bias)
        self._packed: tuple[Projection, Projection] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]` to `[..., D]`, in the dtype of `down`: T5 keeps that in fp32 where the rest is fp16."""
        up, down = self._packed or (self._up, self.down)
        hidden = F.dropout(up(x), self.dropout) if self.training else up(x)
        return down(hidden.to(self.down.weight.dtype))

    def _up(self, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        return activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)

    def pack(self, quantization: str | None = None) -> None:
        """Pack the products for generation, the activation fused into the first."""
        pack = functools.partial(pack_linear, quantization=quantization)
        self._packed = (
            (self._pack_gated(pack) if self.gate else pack(self.up, activation=self.activation)),
            pack(self.down),
        )

    def _pack_gated(self, pack: Callable[..., Projection]) -> Projection:
        assert self.gate is not None
        kernel = kernels.load("activations", self.up.weight.device)
        if kernel is None:
            gate, up = pack(self.gate, activation=self.activation), pack(self.up)
            return lambda x: gate(x) * up(x)
        joint = pack(self.gate, self.up)

        def run(x: Tensor) -> Tensor:
            with torch.cuda.device(x.device):
                return kernel.gated(joint(x).flatten(0, -2), self.activation).unflatten(0, x.shape[:-1])

        return run

    def unpack(self) -> None:
        """Forget the packed weights."""
        self._packed = None
