"""Lists the tiles that a mask keeps in the form that FlashAttention-4 walks.

Each tile along one side of the sequence has a count and a row of ascending tile numbers of the other side,
as long as the longest. There are two such lists: tiles that are kept whole, and mixed tiles, in which the
kernel looks up every token pair in the block table. The kernel masks the end of the sequence only in the last
tile of a list, so the numbers must ascend.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_tiles import cut_into_tiles

T = TypeVar("T")
MOST_BYTES = 1 << 28  # of one list; beyond it, rows that keep everything are computed apart


@dataclass(frozen=True)
class Lists:
    """Holds the kept tiles of each tile along one side of the sequence, int32 on the device.

    Attributes:
        counts, indices: of whole tiles, `[1, H or 1, T]` and `[1, H or 1, T, W]`.
        mixed_counts, mixed_indices: the same for mixed tiles.
        tile: tokens of a tile, queries then keys.
        table: the mask's blocks, int8 `[H or 1, Q, K]`, 1 if kept, with whole tiles of blocks; None if no
            tile is mixed.
        block_size: tokens of a block of the table.
    """

    counts: Tensor
    indices: Tensor
    mixed_counts: Tensor
    mixed_indices: Tensor
    tile: tuple[int, int]
    table: Tensor | None
    block_size: int

    def cut(self, rows: int, columns: int) -> "Lists":
        """Returns the lists of the first `rows` tiles and of tiles below `columns` in them."""
        counts, indices = _cut(self.counts, self.indices, rows, columns)
        mixed_counts, mixed_indices = _cut(self.mixed_counts, self.mixed_indices, rows, columns)
        return Lists(counts, indices, mixed_counts, mixed_indices, self.tile, self.table, self.block_size)


@dataclass(frozen=True)
class Cut:
    """Says how a mask is cut: its blocks, the tokens of both sides, and the tile, each queries then keys."""

    block_size: int
    tokens: tuple[int, int]
    tile: tuple[int, int]
    transposed: bool = False  # list the query tiles of each key tile


def make_lists(
    blocks: Tensor, cut: Cut, device: torch.device, tokens: tuple[int, int] | None = None
) -> Lists:
    """Lists the kept tiles of `blocks`, bool `[Q, K]` or `[H, Q, K]` on the CPU.

    Makes the lists once, and caches them on the tensor `blocks`.

    Args:
        tokens: how many of the queries and of the keys count, from the first on; None for all.
    """
    whole = cached(blocks, (cut, device), lambda: _make(blocks, cut, device))
    if tokens is None or tokens == cut.tokens:
        return whole
    tiles = [-(-count // tile) for count, tile in zip(tokens, cut.tile, strict=True)]
    rows, columns = reversed(tiles) if cut.transposed else tiles
    return cached(blocks, (cut, device, rows, columns), lambda: whole.cut(rows, columns))


def cached(blocks: Tensor, key: Hashable, build: Callable[[], T]) -> T:
    """Returns the value of `build()`, computed once for each key and kept with the tensor."""
    kept = blocks.__dict__.setdefault("flash4", {})
    if key not in kept:
        with torch.inference_mode(False):
            kept[key] = build()
    return kept[key]


def is_dense(blocks: Tensor) -> bool:
    """Returns whether every block is kept."""
    return cached(blocks, "dense", lambda: bool(blocks.all()))


def forward_parts(
    blocks: Tensor, cut: Cut, end: tuple[int, int], device: torch.device
) -> list[tuple[slice, Lists | None]]:
    """Returns which queries to compute together, with their lists, None if they attend to every key.

    Args:
        end: how many of the queries and of the keys count, from the first on.
    """
    (rows, keys), parts = end, []
    sparse = cached(blocks, ("sparse rows", cut), lambda: _sparse_rows(blocks, cut))
    if rows and sparse:
        upper, counted = blocks, (min(rows, sparse), keys)
        if sparse < cut.tokens[0]:
            upper = cached(blocks, ("rows", sparse), lambda: blocks[..., : sparse // cut.block_size, :])
        lists = make_lists(upper, replace(cut, tokens=(sparse, cut.tokens[1])), device, counted)
        parts.append((slice(counted[0]), lists))
    if rows > sparse:
        parts.append((slice(sparse, rows), None))
    return parts


def _sparse_rows(blocks: Tensor, cut: Cut) -> int:
    """Counts the queries before those that are computed densely.

    These are all of a mask that keeps everything. If the lists take more than `MOST_BYTES`, these are also
    the last ones that keep every key in all heads: a list is as wide as its longest row.
    """
    tiles = [-(-tokens // tile) for tokens, tile in zip(cut.tokens, cut.tile, strict=True)]
    heads = blocks.reshape(-1, *blocks.shape[-2:])
    if not is_dense(blocks) and 4 * len(heads) * tiles[0] * tiles[1] <= MOST_BYTES:
        return cut.tokens[0]
    full = np.logical_and.accumulate(heads.numpy().all(axis=(0, 2))[::-1])
    return min(cut.tokens[0], (len(full) - int(full.sum())) * cut.block_size)


def _make(blocks: Tensor, cut: Cut, device: torch.device) -> Lists:
    heads = blocks.to(device).reshape(-1, *blocks.shape[-2:])
    _, some, every = cut_into_tiles(heads, cut.block_size, cut.tokens, cut.tile)
    mixed = some & ~every
    table = None
    if bool(mixed.any()):
        # a tile's second half may lie behind the end: the kernel looks up its pairs, and drops them
        missing = [-heads.shape[axis] % (cut.tile[axis - 1] // cut.block_size) for axis in (1, 2)]
        table = F.pad(heads.to(torch.int8), (0, missing[1], 0, missing[0]))
    if cut.transposed:
        every, mixed = every.mT.contiguous(), mixed.mT.contiguous()
    return Lists(*_list(every), *_list(mixed), cut.tile, table, cut.block_size)


def _list(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Returns counts and ascending numbers of the kept tiles in each row of `[H or 1, rows, columns]`."""
    counts = kept.sum(-1, dtype=torch.int32)
    width = max(1, int(counts.max()))
    return counts[None], torch.stack([_packed(head, width) for head in kept])[None]


def _packed(kept: Tensor, width: int) -> Tensor:
    """Moves the numbers of the kept columns of `[rows, columns]` to the front, int32 `[rows, width]`.

    Does not wait for the device.
    """
    positions = kept.cumsum(-1).sub_(1).masked_fill_(~kept, width)
    numbers = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device).expand(kept.shape)
    packed = numbers.new_zeros(len(kept), width + 1).scatter_(1, positions, numbers)
    return packed[:, :width].contiguous()


def _cut(counts: Tensor, indices: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    counts, indices = counts[..., :rows], indices[..., :rows, :columns]
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    return (listed & (indices < columns)).sum(-1, dtype=torch.int32), indices
