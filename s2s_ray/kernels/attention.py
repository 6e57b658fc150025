"""Attention over packed rows: one query position at a time for decoding, whole rows for encoding.

Dimensions: R rows, W sequences a row, N = R x W, H heads, K head size, P positions, I = H x K, T packed tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mix(
    queries,
    keys,
    values,
    bias,
    seen,
    best,
    total,
    mixed,
    scale,
    ONE: tl.constexpr,
    EXACT: tl.constexpr,
    ALL: tl.constexpr,
    BIASED: tl.constexpr,
):
    """One block of keys and values into the running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

    ALL: every query sees every key of the block. scale, which is positive, is applied in the exponent, where it costs
    nothing, unless there is a bias to add.
    """
    if ONE:
        scores = tl.sum(queries.to(tl.float32) * keys.to(tl.float32), axis=1)[None]
    elif EXACT:
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    else:
        scores = tl.dot(queries, tl.trans(keys))
    if BIASED:
        scores = scores * scale + bias
    if not ALL:
        scores = tl.where(seen, scores, float("-inf"))
    factor = 1.0 if BIASED else scale
    new_best = tl.maximum(best, tl.max(scores, axis=1) * factor)
    shift = new_best if ALL else tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(best - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    if ONE:
        mixed = mixed * shrink[:, None] + tl.sum(tl.trans(weights) * values.to(tl.float32), axis=0)[None]
    elif EXACT:
        mixed = mixed * shrink[:, None] + tl.dot(weights, values, input_precision="ieee")
    else:
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
    return new_best, total, mixed


@triton.jit
def _decode(
    query,
    new,
    held,
    pages,
    lengths,
    done,
    ancestry,
    table,
    output,
    query_stride,
    new_stride,
    positions,
    max_pages,
    table_width,
    scale,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_2: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    OWN: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row and head a program; the heads of a row run side by side, since their keys lie side by side.

    OWN: self-attention, which first stores the new keys and values; else over the row's source, whose tokens lie in
    pages. A row that is done gets zeros.
    """
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, WIDTH_2)
    size = tl.arange(0, SIZE_2)
    inside = (lane < WIDTH)[:, None] & (size < SIZE)[None]
    column = head * SIZE + size
    count = tl.load(lengths + row).to(tl.int32)
    if OWN:
        count = (count + 1) * WIDTH
        if tl.load(done + row) == 0:
            source = new + (row * WIDTH + lane)[:, None] * new_stride + column[None]
            slot = row * positions * WIDTH + count - WIDTH + lane
            target = held + slot[:, None] * (2 * HEADS * SIZE) + column[None]
            tl.store(target, tl.load(source, inside), inside)
            tl.store(target + HEADS * SIZE, tl.load(source + HEADS * SIZE, inside), inside)
        tl.debug_barrier()
    if tl.load(done + row) != 0:
        count = 0
    queries = tl.load(query + (row * WIDTH + lane)[:, None] * query_stride + column[None], inside, other=0.0)
    best = tl.full([WIDTH_2], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH_2], tl.float32)
    mixed = tl.zeros([WIDTH_2, SIZE_2], tl.float32)
    for start in range(0, count, KEYS):
        index = start + tl.arange(0, KEYS)
        real = index < count
        if OWN:
            slot = row * positions * WIDTH + index
        else:
            slot = tl.load(pages + row * max_pages + index // PAGE, real, other=0).to(tl.int64) * PAGE + index % PAGE
        place = held + slot[:, None] * (2 * HEADS * SIZE) + column[None]
        filled = real[:, None]
        if SIZE != SIZE_2:
            filled = filled & (size < SIZE)[None]
        keys = tl.load(place, filled, other=0.0)
        values = tl.load(place + HEADS * SIZE, filled, other=0.0)
        bias = tl.zeros([1, KEYS], tl.float32)
        seen = real[None] & (lane < WIDTH)[:, None]
        if OWN and BIAS:
            distance = tl.minimum((count - 1) // WIDTH - index // WIDTH, table_width - 1)
            bias = tl.load(table + head * table_width + distance, real, other=0.0).to(tl.float32)[None] * _LOG2_E
        if OWN and WIDTH > 1:
            writer = ancestry + (row * WIDTH + lane)[:, None] * positions + (index // WIDTH)[None]
            seen = seen & (tl.load(writer, seen, other=-1) == (index % WIDTH)[None])
        best, total, mixed = _mix(
            queries, keys, values, bias, seen, best, total, mixed, scale, WIDTH_2 == 1, EXACT, False, OWN and BIAS
        )
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    place = output + (row * WIDTH + lane)[:, None] * (HEADS * SIZE) + column[None]
    tl.store(place, mixed.to(output.dtype.element_ty), inside)


def decode_self(
    query: Tensor,
    new: Tensor,
    held: Tensor,
    ages: Tensor,
    done: Tensor,
    ancestry: Tensor | None,
    table: Tensor | None,
    *,
    heads: int,
    width: int,
    scale: float,
) -> Tensor:
    """Store each sequence's new key and value and attend over its history, the new position included.

    query `[N, I]` and new `[N, 2 I]` (keys, then values; rows may be strided), held `[R, P, W, 2 I]`, ages int64 `[R]`
    (positions held so far), done bool `[R]`, ancestry int8 `[R, W, P]` (which of the row's sequences wrote each
    position; None where W is 1), table `[H, distances]`, added to the scores, or None. Returns `[N, I]`.
    """
    positions = held.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _launch(
        query, new, held, ages, ages, done, ancestry, table, output, positions, 1, heads, width, scale, own=True, page=1
    )
    return output


def decode_cross(
    query: Tensor,
    held: Tensor,
    pages: Tensor,
    lengths: Tensor,
    done: Tensor,
    *,
    heads: int,
    width: int,
    scale: float,
    page: int,
    brief: bool = False,
) -> Tensor:
    """Attend over each row's source: the W sequences of a row read its keys and values once.

    query `[N, I]`, held `[page slots, 2 I]`, pages int32 `[R, pages a row]`, lengths int32 `[R]` in tokens, done bool
    `[R]`; brief: most rows are short. Returns `[N, I]`.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _launch(
        query, query, held, pages, lengths, done, None, None, output, 0, pages.shape[1], heads, width, scale,
        own=False, page=page, brief=brief,
    )  # fmt: skip
    return output


# One query is padded to the 16 that a matrix instruction takes, since only products are pipelined with the loads: 4.1
# against 3.0 TB/s (H200, bf16, 512 rows of 256 to 1024 tokens). Keys and values a few at a time suit rows of 30 tokens,
# 74 against 222 us, and histories; rows of hundreds do not. See docs/performance.md.
def _launch(
    query: Tensor,
    new: Tensor,
    held: Tensor,
    pages: Tensor,
    lengths: Tensor,
    done: Tensor,
    ancestry: Tensor | None,
    table: Tensor | None,
    output: Tensor,
    positions: int,
    max_pages: int,
    heads: int,
    width: int,
    scale: float,
    *,
    own: bool,
    page: int,
    brief: bool = False,
) -> None:
    size = query.shape[1] // heads
    exact = query.dtype == torch.float32
    few = (own or brief) and not exact
    _decode[(heads, lengths.shape[0])](
        query,
        new,
        held,
        pages,
        lengths,
        done,
        done if ancestry is None else ancestry,
        query if table is None else table,
        output,
        query.stride(0),
        new.stride(0),
        positions,
        max_pages,
        0 if table is None else table.shape[1],
        scale * _LOG2_E.value,
        HEADS=heads,
        SIZE=size,
        SIZE_2=max(16, triton.next_power_of_2(size)),
        WIDTH=width,
        WIDTH_2=1 if exact and width == 1 else max(16, triton.next_power_of_2(width)),
        PAGE=page,
        KEYS=16 if few and width == 1 else 32 if few or exact else 128,
        OWN=own,
        BIAS=table is not None,
        EXACT=exact,
        num_warps=1 if few else 4,
        num_stages=3 if own and width > 1 else 2,
    )


@triton.jit
def _row_block(
    qkv,
    table,
    queries,
    line,
    start,
    begin,
    length,
    head,
    best,
    total,
    mixed,
    scale,
    table_width,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_2: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A block of queries over the keys from `begin` on; WHOLE: KEYS of them are there."""
    index = begin + tl.arange(0, KEYS)
    size = tl.arange(0, SIZE_2)
    real = index < length
    place = qkv + (start + index)[:, None] * (3 * HEADS * SIZE) + (head + HEADS) * SIZE + size[None]
    if WHOLE and SIZE == SIZE_2:
        keys = tl.load(place)
        values = tl.load(place + HEADS * SIZE)
    else:
        filled = real[:, None] & (size < SIZE)[None]
        keys = tl.load(place, filled, other=0.0)
        values = tl.load(place + HEADS * SIZE, filled, other=0.0)
    bias = tl.zeros([1, KEYS], tl.float32)
    if BIAS:
        farthest = table_width // 2
        offset = tl.minimum(tl.maximum(index[None] - line[:, None], -farthest), farthest) + farthest
        bias = tl.load(table + head * table_width + offset).to(tl.float32) * _LOG2_E
    return _mix(queries, keys, values, bias, real[None], best, total, mixed, scale, False, EXACT, WHOLE, BIAS)


@triton.jit
def _ragged(
    qkv,
    blocks,
    starts,
    table,
    output,
    scale,
    table_width,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_2: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One block of a row's queries and one head a program, over all keys of that row."""
    head = tl.program_id(0)
    row = tl.load(blocks + 2 * tl.program_id(1))
    first = tl.load(blocks + 2 * tl.program_id(1) + 1)
    start = tl.load(starts + row).to(tl.int64)
    length = (tl.load(starts + row + 1) - start).to(tl.int32)
    size = tl.arange(0, SIZE_2)
    column = head * SIZE + size
    line = first + tl.arange(0, QUERIES)
    inside = (line < length)[:, None] & (size < SIZE)[None]
    stride = 3 * HEADS * SIZE
    queries = tl.load(qkv + (start + line)[:, None] * stride + column[None], inside, other=0.0)
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, SIZE_2], tl.float32)
    whole = length // KEYS * KEYS
    for begin in range(0, whole, KEYS):
        best, total, mixed = _row_block(
            qkv, table, queries, line, start, begin, length, head, best, total, mixed, scale, table_width,
            HEADS, SIZE, SIZE_2, KEYS, BIAS, EXACT, True,
        )  # fmt: skip
    if whole < length:
        best, total, mixed = _row_block(
            qkv, table, queries, line, start, whole, length, head, best, total, mixed, scale, table_width,
            HEADS, SIZE, SIZE_2, KEYS, BIAS, EXACT, False,
        )  # fmt: skip
    mixed = mixed / total[:, None]
    place = output + (start + line)[:, None] * (HEADS * SIZE) + column[None]
    tl.store(place, mixed.to(output.dtype.element_ty), inside)


QUERY_BLOCK = 64  # queries a program of `ragged` takes


def ragged(qkv: Tensor, starts: Tensor, blocks: Tensor, table: Tensor | None, *, heads: int, scale: float) -> Tensor:
    """Every token attends to all tokens of its own row.

    qkv `[T, 3 I]` contiguous; starts int32 `[R + 1]`, where each row begins in T; blocks int32 `[B, 2]`, the row and
    first query of each block of QUERY_BLOCK queries; table `[H, 2 F + 1]`, added to the scores of a key that lies
    -F ... F tokens on (the ends hold for all that are farther), or None. Returns `[T, I]`.
    """
    inner = qkv.shape[1] // 3
    size = inner // heads
    exact = qkv.dtype == torch.float32
    output = torch.empty(qkv.shape[0], inner, dtype=qkv.dtype, device=qkv.device)
    _ragged[(heads, blocks.shape[0])](
        qkv,
        blocks,
        starts,
        qkv if table is None else table,
        output,
        scale * _LOG2_E.value,
        0 if table is None else table.shape[1],
        HEADS=heads,
        SIZE=size,
        SIZE_2=max(16, triton.next_power_of_2(size)),
        QUERIES=QUERY_BLOCK,
        KEYS=32 if exact else 64,
        BIAS=table is not None,
        EXACT=exact,
        num_warps=8 if exact else 4,
        num_stages=2 if exact else 3,
    )
    return output


@triton.jit
def _scatter(source, index, target, width, WIDTH_2: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_2)
    place = tl.load(index + row)
    value = tl.load(source + row * width + column, column < width)
    tl.store(target + place * width + column, value, column < width)


def scatter(source: Tensor, index: Tensor, target: Tensor) -> None:
    """Write the rows of source `[T, C]` to the rows `index` int64 `[T]` of target `[slots, C]`, all contiguous."""
    width = source.shape[1]
    _scatter[(source.shape[0],)](source, index, target, width, WIDTH_2=triton.next_power_of_2(width), num_warps=4)
