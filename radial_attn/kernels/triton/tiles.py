"""Lists the tiles that a mask keeps, in the form in which tiled kernels walk them.

A kernel's tile of `rows` x `columns` tokens may be finer or coarser than the blocks of the mask. A tile is
whole if all of its token pairs are kept. It is mixed, and masked inside the kernel, if it holds the end of
the sequence, text whose length differs by sample, or blocks that are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
        return _list(_cut(blocks.numpy(), extent, rows, columns), columns, device)

    return _cached(blocks, ("query", extent, rows, columns, device), build)


def key_tiles(blocks: Tensor, extent: Extent, rows: int, columns: int, device: torch.device) -> Tiles:
    """Lists the query tiles of each key tile; arguments are as in `query_tiles`."""

    def build() -> Tiles:
        tiles = _cut(blocks.numpy(), extent, rows, columns)
        return _list([None if x is None else x.swapaxes(1, 2) for x in tiles], rows, device)

    return _cached(blocks, ("key", extent, rows, columns, device), build)


def _cached(blocks: Tensor, key: tuple, build: Callable[[], Tiles]) -> Tiles:
    cache = blocks.__dict__.setdefault("tiles", {})
    if key not in cache:
        with torch.inference_mode(False):
            cache[key] = build()
    return cache[key]


def _cut(blocks: np.ndarray, extent: Extent, rows: int, columns: int) -> list[np.ndarray | None]:
    """Returns non-empty tiles, whole tiles and patterns, each `[H or 1, query tiles, key tiles]`."""
    cells = blocks if blocks.ndim == 3 else blocks[None]
    length = extent.tokens if extent.rows is None else extent.rows
    for axis, tile, tokens in ((1, rows, length), (3, columns, extent.tokens)):
        cells = _split(cells, axis, extent.block_size, tile, tokens)
    some, every = cells.any(axis=(2, 4)), cells.all(axis=(2, 4))
    patterns = None
    if (some & ~every).any():
        bits = cells.swapaxes(2, 3).reshape(*some.shape, -1)
        patterns = bits @ (1 << np.arange(bits.shape[-1], dtype=np.uint64))
    every[:, length // rows :] = False
    every[:, :, extent.mixed_from // columns :] = False
    return [some, every, patterns]


def _split(blocks: np.ndarray, axis: int, size: int, tile: int, tokens: int) -> np.ndarray:
    """Splits an axis of blocks of `size` tokens into tiles of `tile` tokens, then the blocks of each tile.

    A last tile that lacks blocks repeats its last one.
    """
    if tile <= size:
        finer = np.repeat(blocks, size // tile, axis)
        return np.expand_dims(np.take(finer, range(-(-tokens // tile)), axis), axis + 1)
    ratio = tile // size
    padding = [(0, 0)] * blocks.ndim
    padding[axis] = (0, -blocks.shape[axis] % ratio)
    padded = np.pad(blocks, padding, mode="edge")
    return padded.reshape(*padded.shape[:axis], -1, ratio, *padded.shape[axis + 1 :])


def _list(tiles: list[np.ndarray | None], step: int, device: torch.device) -> Tiles:
    some, every, patterns = tiles
    kept = np.stack([some & every, some & ~every], axis=2)
    counts = np.count_nonzero(kept, axis=3)
    ends = np.cumsum(counts).reshape(counts.shape)
    offsets = np.concatenate([ends[..., :1] - counts[..., :1], ends], axis=2).astype(np.int32)
    starts = np.broadcast_to(np.arange(kept.shape[3], dtype=np.int32) * step, kept.shape)[kept]
    starts = np.append(starts, np.int32(0))
    if patterns is not None:
        patterns = np.broadcast_to(patterns[:, :, None], kept.shape)[kept].view(np.int64)
        patterns = torch.from_numpy(patterns).to(device)
    mixed = bool(counts[..., 1].any())
    return Tiles(torch.from_numpy(offsets).to(device), torch.from_numpy(starts).to(device), patterns, mixed)
