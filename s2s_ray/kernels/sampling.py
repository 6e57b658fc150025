"""Sampling with temperature and top-p without sorting the vocabulary.

Sampling goes through the tokens from the likeliest on, and both questions it asks, where the nucleus ends and where the
draw falls, are the same: at which score does the mass of all higher scores reach a target? The answer is found digit by
digit of the score's bits, mapped to integers of the same order, with one pass over the row for two bits. Tokens of one
score go by their ids.

Dimensions: N sequences, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(2048)  # tokens
_LOW = {torch.float32: 0, torch.float16: 12, torch.bfloat16: 16}  # bits of a score as fp32 that are all alike


@triton.jit
def _load(scores, start, vocabulary, peak, rate):
    """Tokens, their scores as integers of the same order, and their mass."""
    token = start + tl.arange(0, _BLOCK)
    x = tl.load(scores + token, token < vocabulary, other=float("-inf")).to(tl.float32)
    bits = x.to(tl.uint32, bitcast=True)
    return token, tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000), tl.exp((x - peak) * rate)


@triton.jit
def _mass(key, peak, rate, LOW: tl.constexpr):
    """The mass of one token with this score, given by all bits but the LOW last."""
    negative = key >> (31 - LOW) == 0
    whole = (key << LOW) | tl.where(negative, (1 << LOW) - 1, 0).to(tl.uint32)
    bits = tl.where(negative, ~whole, whole ^ 0x80000000)
    return tl.exp((bits.to(tl.float32, bitcast=True) - peak) * rate).to(tl.float64)


@triton.jit
def _reach(scores, vocabulary, peak, rate, target, LOW: tl.constexpr):
    """The score at which the mass of the higher ones, which comes second, and its own, third, exceed the target."""
    key = tl.full((), 0, tl.uint32)
    above = tl.full((), 0.0, tl.float64)
    own = tl.full((), 0.0, tl.float64)
    for digit in range((32 - LOW) // 2):
        shift = 30 - 2 * digit
        mass_0 = tl.full((), 0.0, tl.float64)
        mass_1 = tl.full((), 0.0, tl.float64)
        mass_2 = tl.full((), 0.0, tl.float64)
        mass_3 = tl.full((), 0.0, tl.float64)
        for start in range(0, vocabulary, _BLOCK):
            _, keys, mass = _load(scores, start, vocabulary, peak, rate)
            first = keys >> shift
            mass_0 += tl.sum(tl.where(first == key * 4, mass, 0.0), axis=0).to(tl.float64)
            mass_1 += tl.sum(tl.where(first == key * 4 + 1, mass, 0.0), axis=0).to(tl.float64)
            mass_2 += tl.sum(tl.where(first == key * 4 + 2, mass, 0.0), axis=0).to(tl.float64)
            mass_3 += tl.sum(tl.where(first == key * 4 + 3, mass, 0.0), axis=0).to(tl.float64)
        above_2 = above + mass_3
        above_1 = above_2 + mass_2
        above_0 = above_1 + mass_1
        pick = tl.full((), 3, tl.uint32)
        own = mass_3
        if (mass_2 > 0) & (above_2 <= target):
            pick, above, own = pick * 0 + 2, above_2, mass_2
        if (mass_1 > 0) & (above_1 <= target):
            pick, above, own = pick * 0 + 1, above_1, mass_1
        if (mass_0 > 0) & (above_0 <= target):
            pick, above, own = pick * 0, above_0, mass_0
        key = key * 4 + pick
    return key, above, own


@triton.jit
def _sample(scores, temperatures, nuclei, draws, tokens, vocabulary, LOW: tl.constexpr):
    row = tl.program_id(0)
    scores += row.to(tl.int64) * vocabulary
    nucleus = tl.load(nuclei + row)
    rate = 1.0 / tl.load(temperatures + row)
    peak = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocabulary, _BLOCK):
        token = start + tl.arange(0, _BLOCK)
        x = tl.load(scores + token, token < vocabulary, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(x, axis=0))
    kept = tl.full((), 0.0, tl.float64)
    for start in range(0, vocabulary, _BLOCK):
        _, _, mass = _load(scores, start, vocabulary, peak, rate)
        kept += tl.sum(mass, axis=0).to(tl.float64)
    if nucleus < 1.0:  # of the tokens with the last score only as many as are needed
        target = kept * nucleus
        key, above, own = _reach(scores, vocabulary, peak, rate, target, LOW)
        each = _mass(key, peak, rate, LOW)
        kept = above + tl.minimum(own, tl.ceil((target - above) / each) * each)
    target = kept * tl.load(draws + row)
    key, above, own = _reach(scores, vocabulary, peak, rate, target, LOW)
    each = _mass(key, peak, rate, LOW)
    last = tl.floor(own / each + 0.5) - 1.0
    place = tl.maximum(tl.minimum(tl.floor((target - above) / each), last), 0.0).to(tl.int32)
    passed = 0
    chosen = 0
    for start in range(0, vocabulary, _BLOCK):
        token, keys, _ = _load(scores, start, vocabulary, peak, rate)
        alike = ((keys >> LOW) == key) & (token < vocabulary)
        order = passed + tl.cumsum(alike.to(tl.int32), axis=0) - 1
        chosen = tl.maximum(chosen, tl.max(tl.where(alike & (order == place), token, 0), axis=0))
        passed += tl.sum(alike.to(tl.int32), axis=0)
    tl.store(tokens + row, chosen)


def sample(scores: Tensor, temperatures: Tensor, nuclei: Tensor, draws: Tensor) -> Tensor:
    """Contiguous scores `[N, V]`, temperatures fp32, top-p fp32 and draws fp64 in [0, 1), all `[N]`, to tokens int64
    `[N]`: by the inverse of the cumulative sum over the tokens from the likeliest on.
    """
    rows, vocabulary = scores.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=scores.device)
    low = _LOW[scores.dtype]
    _sample[(rows,)](scores, temperatures, nuclei, draws, tokens, vocabulary, LOW=low, num_warps=8)
    return tokens
