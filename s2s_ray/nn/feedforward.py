"""The position-wise feed-forward block."""

from torch import Tensor, nn
from torch.nn import functional as F

from s2s_ray.nn.linear import ACTIVATIONS, Projection, pack_linear


class FeedForward(nn.Module):
    """`[..., D] -> [..., intermediate] -> [..., D]` with an activation and its dropout in between."""

    def __init__(self, hidden_dim: int, intermediate_dim: int, activation: str, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.up = nn.Linear(hidden_dim, intermediate_dim)
        self.down = nn.Linear(intermediate_dim, hidden_dim)
        self._packed: tuple[Projection, Projection] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., D]` to `[..., D]`."""
        if self._packed is not None:
            up, down = self._packed
            return down(up(x))
        hidden = ACTIVATIONS[self.activation](self.up(x))
        return self.down(F.dropout(hidden, self.dropout, self.training))

    def pack(self) -> None:
        """Pack both products for generation, the activation fused into the first."""
        self._packed = (pack_linear(self.up, activation=self.activation), pack_linear(self.down))

    def unpack(self) -> None:
        """Forget the packed weights."""
        self._packed = None
