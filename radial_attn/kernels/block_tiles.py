"""Cuts the blocks of a mask into the tiles of a kernel."""

import torch
from torch import Tensor


def cut_into_tiles(
    blocks: Tensor, block_size: int, tokens: tuple[int, int], tile: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the blocks of each tile, whether the tile keeps some of them, and whether it keeps all.

    Computes on the device of `blocks`, as heads that choose their blocks change them at each new density.

    Args:
        blocks: bool `[Q, K]` or `[H, Q, K]`.
        tokens: numbers of query and key tokens.
        tile: query and key tokens of a tile, which may be finer or coarser than a block.

    Returns:
        Bool `[H or 1, query tiles, blocks, key tiles, blocks]`, and two `[H or 1, query tiles, key tiles]`.
    """
    cells = blocks if blocks.ndim == 3 else blocks[None]
    for axis, side, length in zip((1, 3), tile, tokens, strict=True):
        cells = _split(cells, axis, block_size, side, length)
    return cells, cells.any(dim=(2, 4)), cells.all(dim=(2, 4))


def _split(blocks: Tensor, axis: int, size: int, tile: int, tokens: int) -> Tensor:
    """Splits an axis of blocks of `size` tokens into tiles of `tile` tokens, then the blocks of each tile.

    If the last tile lacks blocks, the last block is repeated.
    """
    count, ratio = -(-tokens // tile), max(1, tile // size)
    at = torch.arange(count * ratio, device=blocks.device) * tile // (size * ratio)
    return blocks.index_select(axis, at.clamp(max=blocks.shape[axis] - 1)).unflatten(axis, (count, ratio))
