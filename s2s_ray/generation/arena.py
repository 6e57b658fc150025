"""Keys and values of a fixed number of rows at fixed addresses: what a captured decoding step reads and writes.

Every row has a place for its self-attention history and a list of pages for its source. Beams share the pages of their
row; which beam wrote each position of a beam's history is a table (`ancestry`), so nothing is copied when beams move.

Dimensions: R rows, W sequences a row, N = R x W, P positions, H heads, I = H x head size, S source length.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s2s_ray.models.backbone import Backbone
from s2s_ray.nn.layers import DecoderLayer
from s2s_ray.nn.ragged import all_to_device, attention_kernels

PAGE = 32  # source tokens


class Arena:
    """The cache of one lane of the slot decoder; it stands in for `DecoderCache` in `Backbone.decode`.

    `ages` int64 `[R]` counts each row's positions; it stops where `done` bool `[R]`, which the search owns, is set.
    """

    def __init__(
        self,
        backbone: Backbone,
        done: Tensor,
        *,
        width: int,
        positions: int,
        span: int,
        source_tokens: int,
        brief: bool = False,
    ) -> None:
        """positions: the most that a sequence can have; span: source tokens that a row can have; source_tokens: room
        for all rows' sources together; brief: most sources are short, which only decides about speed.
        """
        layers = [layer for layer in backbone.decoder_layers if isinstance(layer, DecoderLayer)]
        self._attentions = [(layer.self_attention, layer.cross_attention) for layer in layers]
        weight = layers[0].self_attention.query.weight
        inner, device = weight.shape[0], weight.device
        rows = done.shape[0]
        self._kernels = attention_kernels(device)
        self.width = width
        self.done = done
        self._brief = brief
        self._device = device
        num_pages = -(-source_tokens // PAGE) + rows
        self._own = torch.empty(len(layers), rows, positions, width, 2 * inner, dtype=weight.dtype, device=device)
        self._cross = torch.empty(len(layers), num_pages * PAGE, 2 * inner, dtype=weight.dtype, device=device)
        self.max_row_pages = min(num_pages, -(-span // PAGE))
        self._pages = torch.zeros(rows, self.max_row_pages, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self.ages = torch.zeros(rows, dtype=torch.int64, device=device)
        self._lanes = torch.arange(width, dtype=torch.int8, device=device)
        self._ancestry = None
        if width > 1:
            self._ancestry = torch.zeros(rows, width, positions, dtype=torch.int8, device=device)
        self._tables = backbone.position_tables()
        self._free = np.arange(num_pages, dtype=np.int32)  # the first `_num_free` of them
        self._num_free = num_pages
        self._held = np.zeros((rows, self.max_row_pages), np.int32)
        self._counts = np.zeros(rows, np.int64)

    @staticmethod
    def bytes_per_position(backbone: Backbone) -> int:
        """Memory that one position (or source token) of one sequence takes in all layers."""
        layers = [layer for layer in backbone.decoder_layers if isinstance(layer, DecoderLayer)]
        weight = layers[0].self_attention.query.weight
        return len(layers) * 2 * weight.shape[0] * weight.element_size()

    def place(self, rows: Sequence[int], lengths: Sequence[int], memory: Tensor) -> None:
        """Give the rows their sources: memory `[sum of lengths, D]`, one row after another."""
        tokens = np.asarray(lengths, np.int32)
        counts = -(-tokens // PAGE)
        pages = np.zeros((len(rows), self.max_row_pages), np.int32)
        self._num_free -= int(counts.sum())
        pages[_first(counts, pages.shape[1])] = self._free[self._num_free : self._num_free + counts.sum()]
        self._held[rows], self._counts[rows] = pages, counts
        place = np.arange(tokens.max())
        slots = pages[:, place // PAGE].astype(np.int64) * PAGE + place % PAGE
        tables = {
            "rows": np.asarray(rows),
            "slots": slots[_first(tokens, len(place))],
            "lengths": tokens,
            "pages": pages,
        }
        sent = all_to_device({name: torch.from_numpy(table) for name, table in tables.items()}, self._device)
        self._pages.index_copy_(0, sent["rows"], sent["pages"])
        self._lengths.index_copy_(0, sent["rows"], sent["lengths"])
        self.ages.index_fill_(0, sent["rows"], 0)
        for layer, (_, attention) in zip(self._cross, self._attentions, strict=True):
            self._kernels.scatter(_side_by_side(*attention.project_memory(memory)), sent["slots"], layer)

    def release(self, rows: Sequence[int]) -> None:
        """Take back the rows' pages."""
        freed = self._held[rows][_first(self._counts[rows], self.max_row_pages)]
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)

    # What Backbone.decode calls.

    def begin_step(self) -> None:
        """Every beam of the newest position continues itself."""
        if self._ancestry is not None:
            index = self.ages[:, None, None].expand(-1, self.width, 1)
            self._ancestry.scatter_(2, index, self._lanes[None, :, None].expand(self.ages.shape[0], -1, 1))

    def end_step(self) -> None:
        """The position written in this step now belongs to the history."""
        self.ages += ~self.done

    def positions(self, device: torch.device) -> Tensor:
        """The position of the token that each sequence now adds, int64 `[N]`, from 0."""
        return self.ages[:, None].expand(-1, self.width).reshape(-1)

    def attend_self(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query, key, value `[N, I]` to the attention output `[N, I]` over each sequence's own history."""
        attention = self._attentions[layer][0]
        table = None if self._tables is None else self._tables[layer % len(self._tables)]
        return self._kernels.decode_self(
            query,
            _side_by_side(key, value),
            self._own[layer],
            self.ages,
            self.done,
            self._ancestry,
            table,
            heads=attention.num_heads,
            width=self.width,
            scale=attention.scale,
        )

    def attend_cross(self, layer: int, query: Tensor) -> Tensor:
        """query `[N, I]` to the attention output `[N, I]` over each row's source."""
        attention = self._attentions[layer][1]
        return self._kernels.decode_cross(
            query,
            self._cross[layer],
            self._pages,
            self._lengths,
            self.done,
            heads=attention.num_heads,
            width=self.width,
            scale=attention.scale,
            page=PAGE,
            brief=self._brief,
        )

    def reorder(self, parents: Tensor) -> None:
        """Continue sequence w of row r from the history of sequence `parents[r, w]`; parents int64 `[R, W]`."""
        if self._ancestry is not None:
            self._ancestry.copy_(self._ancestry.gather(1, parents[:, :, None].expand_as(self._ancestry)))


def _first(counts: np.ndarray, width: int) -> np.ndarray:
    """bool `[R, width]`: the first `counts` of each row."""
    return np.arange(width) < counts[:, None]


def _side_by_side(key: Tensor, value: Tensor) -> Tensor:
    # The two are neighbouring columns of one packed product: a view of both, where they are.
    inner = key.shape[1]
    if value.data_ptr() == key.data_ptr() + inner * key.element_size() and key.stride() == value.stride():
        return key.as_strided((key.shape[0], 2 * inner), key.stride())
    return torch.cat((key, value), dim=1)
