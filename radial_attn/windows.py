"""Windows of tiles, as in Sliding Tile Attention (arXiv 2502.04507), seen from blocks in raster order."""

from math import prod

import numpy as np

from .grid import TokenGrid

TILE, TILE_BLOCK = (
    (6, 8, 8),
    128,
)  # tokens of a tile in time, height and width, the authors', three such blocks


def tile_shape(block: int) -> tuple[int, ...]:
    """Tokens of a tile in time, height and width: the authors', scaled to hold about three blocks."""
    return tuple(round(side * (block / TILE_BLOCK) ** (1 / 3)) for side in TILE)


def axis_radii(count: int) -> np.ndarray:
    """Least radius of the window around one tile of an axis that holds another, int `[count, count]`.

    A window of radius r is of 2 r + 1 tiles, and at the borders it is moved inwards, not cut.
    """
    places = np.arange(count)
    radii = np.zeros((count, count), dtype=int)
    for radius in range(count // 2 + 1):
        first = np.clip(places - radius, 0, max(count - 1 - 2 * radius, 0))[:, None]
        radii += (places < first) | (places > first + 2 * radius)
    return radii


def window_radii(grid: TokenGrid, block: int) -> np.ndarray:
    """The radius of the cube of tiles around a query that holds a key, mean over the pairs of two blocks.

    In other words the sum, over the windows of radius 0, 1, 2, ..., of the share of token pairs that each
    leaves out. Tiles at the far borders of the grid may be short.

    Returns:
        float64 `[Q, Q]` of query and key blocks, in tiles; 0 for blocks of text alone.
    """
    sides = (grid.frames, grid.height, grid.width)
    counts = tuple(-(-size // side) for size, side in zip(sides, tile_shape(block), strict=True))
    tokens = np.unravel_index(np.arange(grid.video_tokens), sides)
    places = tuple(axis // side for axis, side in zip(tokens, tile_shape(block), strict=True))
    members = _members(np.ravel_multi_index(places, counts), prod(counts), grid.num_blocks(block), block)
    axes = zip(np.unravel_index(np.arange(prod(counts)), counts), counts, strict=True)
    radii = np.max([axis_radii(count)[place[:, None], place] for place, count in axes], axis=0)
    pairs = np.outer(*[members.sum(axis=1)] * 2)
    return (members @ radii.astype(np.float32) @ members.T) / np.maximum(pairs, 1).astype(np.float64)


def _members(tiles: np.ndarray, tile_count: int, block_count: int, block: int) -> np.ndarray:
    """Tokens that each block has of each tile, float32 `[Q, tiles]`; `tiles` holds that of each token."""
    cells = np.arange(len(tiles)) // block * tile_count + tiles
    counts = np.bincount(cells, minlength=block_count * tile_count)
    return counts.reshape(block_count, tile_count).astype(np.float32)
