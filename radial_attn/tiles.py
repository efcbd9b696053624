"""Lists of the tiles that a mask keeps, in the form in which tiled kernels walk them.

A kernel's tile of `rows` x `columns` tokens may be finer or coarser than the blocks of the mask. A tile is
whole where all of its token pairs are kept; it is mixed, and masked inside the kernel, where it holds the end
of the sequence, text (whose length may differ by sample) or blocks that are left out.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .block_mask import BlockMask


@dataclass(frozen=True)
class Tiles:
    """The kept tiles of each tile along one side of the sequence: whole ones first, then mixed ones.

    Attributes:
        offsets: int32 `[H or 1, T, 3]`: tile `t` lists its whole tiles in `starts[offsets[t, 0] :
            offsets[t, 1]]`, its mixed ones from there to `offsets[t, 2]`.
        starts: int32, first token of each listed tile, ascending within both parts.
        blocks_matter: whether a mixed tile may hold blocks that are left out, so that the block table has to
            be read; else only the end of the sequence and of the text is to be masked.
    """

    offsets: Tensor
    starts: Tensor
    blocks_matter: bool


def query_tiles(mask: BlockMask, rows: int, columns: int, device: torch.device) -> Tiles:
    """Key tiles of each query tile, on a device, made once for each mask."""

    def build() -> Tiles:
        return _list(*_cut(mask, rows, columns), columns, device)

    return mask.cached(("query tiles", rows, columns, device), build)


def key_tiles(mask: BlockMask, rows: int, columns: int, device: torch.device) -> Tiles:
    """Query tiles of each key tile, on a device, made once for each mask."""

    def build() -> Tiles:
        some, every, matter = _cut(mask, rows, columns)
        return _list(some.swapaxes(1, 2), every.swapaxes(1, 2), matter, rows, device)

    return mask.cached(("key tiles", rows, columns, device), build)


def _cut(mask: BlockMask, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Which tiles keep something and which are whole, bool `[H or 1, query tiles, key tiles]`."""
    blocks = mask.blocks.numpy()
    some = every = blocks if blocks.ndim == 3 else blocks[None]
    tokens, size = mask.grid.tokens, mask.block_size
    for axis, tile in ((1, rows), (2, columns)):
        some = _resample(some, axis, size, tile, tokens, joined=np.any)
        every = _resample(every, axis, size, tile, tokens, joined=np.all)
    matter = bool((some & ~every).any())
    ends = mask.grid.video_tokens if mask.grid.text else tokens
    every = every.copy()
    every[:, tokens // rows :] = False
    every[:, :, ends // columns :] = False
    return some, every, matter


def _resample(
    blocks: np.ndarray, axis: int, size: int, tile: int, tokens: int, *, joined: np.ufunc
) -> np.ndarray:
    """Blocks of `size` as tiles of `tile` tokens along an axis; what the last tile lacks does not count."""
    if tile <= size:
        finer = np.repeat(blocks, size // tile, axis)
        return np.take(finer, range(-(-tokens // tile)), axis)
    ratio = tile // size
    missing = -blocks.shape[axis] % ratio
    last = np.take(blocks, [-1], axis)
    padded = np.concatenate([blocks] + [last] * missing, axis)
    shape = (*padded.shape[:axis], -1, ratio, *padded.shape[axis + 1 :])
    return joined(padded.reshape(shape), axis + 1)


def _list(some: np.ndarray, every: np.ndarray, matter: bool, step: int, device: torch.device) -> Tiles:
    kept = np.stack([some & every, some & ~every], axis=2)
    counts = np.count_nonzero(kept, axis=3)
    ends = np.cumsum(counts).reshape(counts.shape)
    offsets = np.concatenate([ends[..., :1] - counts[..., :1], ends], axis=2).astype(np.int32)
    starts = np.broadcast_to(np.arange(kept.shape[3], dtype=np.int32) * step, kept.shape)[kept]
    return Tiles(torch.from_numpy(offsets).to(device), torch.from_numpy(starts).to(device), matter)
