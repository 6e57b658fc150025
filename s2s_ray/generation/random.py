"""Random numbers that depend on what is drawn for, never on when or beside whom.

A draw is a hash of (seed, row id, step, lane): the SplitMix64 finaliser (Steele, Lea and Flood 2014) applied after each
word is mixed in. The same row gets the same draws in any batch, order, replica or rerun.
"""

import torch
from torch import Tensor

_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit word
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def uniform(*words: Tensor) -> Tensor:
    """int64 tensors of broadcastable shapes to uniform draws in [0, 1), float64 of the broadcast shape."""
    state = torch.zeros((), dtype=torch.int64, device=words[0].device)
    for word in words:
        state = _mix(state ^ word.to(torch.int64))
    return _shift(state, 11).to(torch.float64) * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = x + _INCREMENT
    x = (x ^ _shift(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift(x, 27)) * _MULTIPLY_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical right shift of a signed word
