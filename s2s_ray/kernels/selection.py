"""The best tokens of each sequence and the log of the sum of exponentials, in one pass over the scores; tokens forced.

Dimensions: N sequences, V vocabulary, C candidates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(128)  # tokens whose maximum is kept
_BLOCKS = tl.constexpr(32)  # of them a program
_LEAST = tl.constexpr(-3.0e38)  # what a score of -inf is ranked as


@triton.jit
def _maxima(scores, maxima, peaks, sums, vocabulary, blocks, parts):
    """The maximum of every block of tokens, and each part's share of the sum of exponentials."""
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    block = part * _BLOCKS + tl.arange(0, _BLOCKS)
    token = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None]
    x = tl.load(scores + row * vocabulary + token, token < vocabulary, other=float("-inf")).to(tl.float32)
    maximum = tl.max(x, axis=1)
    peak = tl.max(maximum, axis=0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(maxima + row * blocks + block, maximum, block < blocks)
    tl.store(peaks + row * parts + part, peak)
    tl.store(sums + row * parts + part, tl.sum(tl.sum(tl.exp(x - shift), axis=1), axis=0))


@triton.jit
def _pick(
    scores,
    maxima,
    peaks,
    sums,
    chosen,
    values,
    tokens,
    totals,
    vocabulary,
    blocks,
    parts,
    COUNT: tl.constexpr,
    COUNT_2: tl.constexpr,
    BLOCKS_2: tl.constexpr,
    PARTS_2: tl.constexpr,
):
    """The best tokens lie in the blocks with the best maxima."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_2)
    peak = tl.load(peaks + row * parts + part, part < parts, other=float("-inf"))
    share = tl.load(sums + row * parts + part, part < parts, other=0.0)
    top = tl.max(peak, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.log(tl.sum(share * tl.exp(peak - shift), axis=0)) + shift
    tl.store(totals + row, total)
    block = tl.arange(0, BLOCKS_2)
    best = tl.load(maxima + row * blocks + block, block < blocks, other=float("-inf"))
    best = tl.where(block < blocks, tl.maximum(best, _LEAST), float("-inf"))  # banned tokens rank above taken blocks
    for place in tl.static_range(COUNT):
        _, where = tl.max(best, axis=0, return_indices=True)
        tl.store(chosen + row * COUNT + place, tl.where(place < blocks, where, blocks))
        best = tl.where(block == where, float("-inf"), best)
    tl.debug_barrier()
    lane = tl.arange(0, COUNT_2 * _BLOCK)
    token = tl.load(chosen + row * COUNT + lane // _BLOCK, lane < COUNT * _BLOCK, other=0) * _BLOCK + lane % _BLOCK
    inside = (lane < COUNT * _BLOCK) & (token < vocabulary)
    x = tl.load(scores + row * vocabulary + token, inside, other=float("-inf")).to(tl.float32)
    x = tl.where(inside, tl.maximum(x, _LEAST), float("-inf"))
    for place in tl.static_range(COUNT):
        value, where = tl.max(x, axis=0, return_indices=True)
        value = tl.where(value > _LEAST, value, float("-inf"))
        value = tl.where(total < float("inf"), value, float("nan"))  # a maximum does not show a NaN
        tl.store(values + row * COUNT + place, value)
        block_of = tl.load(chosen + row * COUNT + where // _BLOCK)
        tl.store(tokens + row * COUNT + place, (block_of * _BLOCK + where % _BLOCK).to(tl.int64))
        x = tl.where(lane == where, float("-inf"), x)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores `[N, V]`, contiguous, to their `count` best values fp32 `[N, C]`, best first, their tokens int64 `[N, C]`,
    and the log of the sum of exponentials fp32 `[N]`. A row with a NaN or positive infinity has NaN values.
    """
    rows, vocabulary = scores.shape
    blocks = triton.cdiv(vocabulary, _BLOCK.value)
    parts = triton.cdiv(blocks, _BLOCKS.value)
    device = scores.device
    maxima = torch.empty(rows, blocks, dtype=torch.float32, device=device)
    peaks = torch.empty(rows, parts, dtype=torch.float32, device=device)
    sums = torch.empty_like(peaks)
    chosen = torch.empty(rows, count, dtype=torch.int32, device=device)
    values = torch.empty(rows, count, dtype=torch.float32, device=device)
    tokens = torch.empty(rows, count, dtype=torch.int64, device=device)
    totals = torch.empty(rows, dtype=torch.float32, device=device)
    _maxima[(parts, rows)](scores, maxima, peaks, sums, vocabulary, blocks, parts, num_warps=8)
    _pick[(rows,)](
        scores,
        maxima,
        peaks,
        sums,
        chosen,
        values,
        tokens,
        totals,
        vocabulary,
        blocks,
        parts,
        COUNT=count,
        COUNT_2=triton.next_power_of_2(count),
        BLOCKS_2=triton.next_power_of_2(blocks),
        PARTS_2=triton.next_power_of_2(parts),
        num_warps=2 if count == 1 else 4,
    )
    return values, tokens, totals


_FORCED = tl.constexpr(4096)  # tokens a program


@triton.jit
def _force(scores, now, tokens, vocabulary):
    row = tl.program_id(1).to(tl.int64)
    if tl.load(now + row):
        token = tl.program_id(0) * _FORCED + tl.arange(0, _FORCED)
        only = tl.where(token == tl.load(tokens + row), 0.0, float("-inf"))
        tl.store(scores + row * vocabulary + token, only.to(scores.dtype.element_ty), token < vocabulary)


def force(scores: Tensor, now: Tensor, tokens: Tensor) -> None:
    """`generation.selection.force` of contiguous scores; rows that are not forced are not touched."""
    rows, vocabulary = scores.shape
    _force[(triton.cdiv(vocabulary, _FORCED.value), rows)](scores, now, tokens, vocabulary)
