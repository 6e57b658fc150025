"""Position embeddings. The caller gives positions; no layer counts them."""

from torch import Tensor, nn


class LearnedPositions(nn.Embedding):
    """A learned table whose first `offset` rows are not positions (BART keeps two for its padding index)."""

    def __init__(self, num_positions: int, hidden_dim: int, *, offset: int = 0) -> None:
        super().__init__(num_positions + offset, hidden_dim)
        self.offset = offset

    def forward(self, positions: Tensor) -> Tensor:
        """positions int64 `[...]`, from 0, to `[..., D]`."""
        return super().forward(positions + self.offset)
