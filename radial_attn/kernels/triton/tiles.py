"""Lists the tiles that a mask keeps, in the form in which tiled kernels walk them.

A kernel's tile of `rows` x `columns` tokens may be finer or coarser than the blocks of the mask. A tile is
whole if all of its token pairs are kept. It is mixed, and masked inside the kernel, if it holds the end of
the sequence, text whose length differs by sample, or blocks that are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_tiles import cut_into_tiles


@dataclass(frozen=True)
class Tiles:
    """Lists the kept tiles of each tile along one side of the sequence: whole ones first, then mixed ones.

    Attributes:
        offsets: int32 `[H or 1, T, 3]`: tile `t` lists its whole tiles in `starts[offsets[t, 0] :
            offsets[t, 1]]`, its mixed ones from there to `offsets[t, 2]`.
        starts: int32, first token of each listed tile, ascending within both parts; then a 0, because kernels
            read one ahead.
        patterns: int64, the blocks of each listed tile as bits, 1 if kept, row by row from the lowest bit;
            None if no tile holds a block that is left out: then only the ends of text and sequence count.
        mixed: whether any tile is.
    """

    offsets: Tensor
    starts: Tensor
    patterns: Tensor | None
    mixed: bool


@dataclass(frozen=True)
class Extent:
    """Holds what the tiles depend on besides the blocks.

    Attributes:
        tokens: length of the sequence, as keys.
        block_size: tokens of a block of the mask.
        mixed_from: first key token whose tiles are mixed whatever the blocks say: `tokens`, or the first text
            token if the text is padded and its length differs by sample.
        rows: length of the query, if it differs.
    """

    tokens: int
    block_size: int
    mixed_from: int
    rows: int | None = None


def query_tiles(blocks: Tensor, extent: Extent, rows: int, columns: int, device: torch.device) -> Tiles:
    """Lists the key tiles of each query tile of a mask's `blocks`, on a device.

    Makes the lists once and caches them on the tensor `blocks`, bool `[Q, K]` or `[H, Q, K]` on the CPU.
    """

    def build() -> Tiles:
        return _list(_cut(_values(blocks, device), extent, rows, columns), columns, device)

    return _cached(blocks, ("query", extent, rows, columns, device), build)


def key_tiles(blocks: Tensor, extent: Extent, rows: int, columns: int, device: torch.device) -> Tiles:
    """Lists the query tiles of each key tile; arguments are as in `query_tiles`."""

    def build() -> Tiles:
        tiles = _cut(_values(blocks, device), extent, rows, columns)
        return _list([None if x is None else x.mT for x in tiles], rows, device)

    return _cached(blocks, ("key", extent, rows, columns, device), build)


def _cached(blocks: Tensor, key: tuple, build: Callable[[], Tiles]) -> Tiles:
    cache = blocks.__dict__.setdefault("tiles", {})
    if key not in cache:
        with torch.inference_mode(False):
            cache[key] = build()
    return cache[key]


def _values(blocks: Tensor, device: torch.device) -> Tensor:
    """Returns the blocks on the device, or unmoved if it is "meta", for which kernels are only compiled."""
    return blocks if device.type == "meta" else blocks.to(device)


def _cut(blocks: Tensor, extent: Extent, rows: int, columns: int) -> list[Tensor | None]:
    """Returns non-empty tiles, whole tiles and patterns, each `[H or 1, query tiles, key tiles]`."""
    length = extent.tokens if extent.rows is None else extent.rows
    tokens, tile = (length, extent.tokens), (rows, columns)
    cells, some, every = cut_into_tiles(blocks, extent.block_size, tokens, tile)
    patterns = None
    if bool((some & ~every).any()):
        patterns = torch.zeros(some.shape, dtype=torch.int64, device=some.device)
        across = cells.shape[4]
        for bit in range(cells.shape[2] * across):
            patterns |= cells[:, :, bit // across, :, bit % across].long() << bit
    every[:, length // rows :] = False
    every[:, :, extent.mixed_from // columns :] = False
    return [some, every, patterns]


def _list(tiles: list[Tensor | None], step: int, device: torch.device) -> Tiles:
    some, every, patterns = tiles
    kept = torch.stack([some & every, some & ~every], dim=2)
    counts = kept.sum(dim=3)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    offsets = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=2).to(torch.int32)
    starts = torch.arange(0, kept.shape[3] * step, step, dtype=torch.int32, device=kept.device)
    starts = F.pad(starts.expand(kept.shape)[kept], (0, 1))
    if patterns is not None:
        patterns = patterns[:, :, None].expand(kept.shape)[kept]
    lists = (None if x is None else x.to(device) for x in (offsets, starts, patterns))
    return Tiles(*lists, bool(counts[..., 1].any()))
