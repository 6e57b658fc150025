"""The kernels of `attention.py` in plain torch, with the same arguments and results: what they are tested against, and
what runs where Triton does not.

Dimensions: as in `attention.py`; E is the longest source or history of the call.
"""

from itertools import pairwise

import torch
from torch import Tensor

QUERY_BLOCK = 64


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
    """As `attention.decode_self`."""
    rows, positions = held.shape[:2]
    place = torch.arange(rows, device=query.device)[~done]
    held[place, ages[place]] = new.unflatten(0, (rows, width))[place]
    position = torch.arange(positions, device=query.device)
    seen = (position <= ages[:, None])[:, None, :, None].expand(-1, width, -1, width)  # [R, W, P, W]
    if ancestry is not None:
        seen = seen & (ancestry[..., None] == torch.arange(width, device=query.device))
    bias = torch.zeros(1, device=query.device)
    if table is not None:
        distance = (ages[:, None] - position).clamp(0, table.shape[1] - 1)
        bias = table[:, distance].transpose(0, 1)[:, :, None, :, None].float()  # [R, H, 1, P, 1]
    return _attend(query, held.flatten(1, 2), seen.flatten(2), bias, done, heads, width, scale)


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
    """As `attention.decode_cross`."""
    index = torch.arange(pages.shape[1] * page, device=query.device)
    slots = pages[:, index // page].long() * page + index % page
    seen = (index < lengths[:, None])[:, None].expand(-1, width, -1)
    return _attend(query, held[slots], seen, torch.zeros(1, device=query.device), done, heads, width, scale)


def _attend(
    query: Tensor, held: Tensor, seen: Tensor, bias: Tensor, done: Tensor, heads: int, width: int, scale: float
) -> Tensor:
    # query [N, I], held [R, E, 2 I], seen [R, W, E], bias [R, H, 1, P, 1] or [1]
    rows = held.shape[0]
    keys, values = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in held.chunk(2, dim=-1))
    queries = query.float().view(rows, width, heads, -1).transpose(1, 2)
    scores = queries @ keys.transpose(2, 3) * scale  # [R, H, W, E]
    if bias.dim() > 1:
        scores = (scores.unflatten(-1, (bias.shape[3], -1)) + bias).flatten(-2)
    scores = scores.masked_fill(~(seen & ~done[:, None, None])[:, None], float("-inf"))
    values = values.masked_fill(~seen.any(dim=1)[:, None, :, None], 0.0)  # what was never written may be anything
    mixed = scores.softmax(dim=-1).nan_to_num(0.0) @ values
    return mixed.transpose(1, 2).reshape(query.shape).to(query.dtype)


def ragged(qkv: Tensor, starts: Tensor, blocks: Tensor, table: Tensor | None, *, heads: int, scale: float) -> Tensor:
    """As `attention.ragged`."""
    output = []
    bounds = starts.tolist()
    for start, end in pairwise(bounds):
        # Four dimensions, or torch would not take its flash attention on a CPU.
        parts = qkv[None, start:end].chunk(3, dim=-1)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts)
        bias = None
        if table is not None:
            farthest = table.shape[1] // 2
            place = torch.arange(end - start, device=qkv.device)
            bias = table[:, (place[None] - place[:, None]).clamp(-farthest, farthest) + farthest].to(query.dtype)[None]
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        output.append(mixed[0].transpose(0, 1).flatten(1))
    return torch.cat(output)


def scatter(source: Tensor, index: Tensor, target: Tensor) -> None:
    """As `attention.scatter`."""
    target.index_copy_(0, index, source)
