"""Other static masks, for comparison: as dense as the radial mask of the same options, and built as simply.

Each has one number that makes it denser; it is chosen so that the density comes nearest to the radial one's.
Sink, text and the diagonal are kept as the radial mask keeps them.
"""

from collections.abc import Callable
from math import prod

import numpy as np
import torch

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .radial import RadialConfig, band_blocks, radial_rule_mask

TOLERANCE = 0.05  # of the density, relative to that of the radial mask
SEED = 0  # of the random mask
GOLDEN = 0.5 * (5**0.5 - 1)  # whose multiples, modulo 1, are spread evenly
TILE = (6, 8, 8)  # tokens of a tile in time, height and width, the authors'
TILE_BLOCK = 128  # three such blocks make a tile
TRIFLE = 1e-9  # by which the nearer of two blocks alike in all else comes first


def compared_mask(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """The mask of `config.pattern`, one of `COMPARED`, at the density of the radial mask of these options.

    - "spatial": whole frames up to a frame distance, and a band in the frames one further: attention to what
      is near in time, as in the spatial heads of Sparse VideoGen (arXiv 2502.01776).
    - "temporal": in every frame a band around the query's own position, a token wider up to some distance:
      the temporal heads of the same.
    - "sliding_tile": in each row as many blocks, those that the smallest windows hold: cubes of 1, 3,
      5, ... tiles around the query's own, moved inwards at the borders, as in Sliding Tile Attention
      (arXiv 2502.04507). There a block is a tile; here tokens are in raster order, so a block counts by the
      share of its token pairs that each window holds (radial_attn/windows.py).
    - "strided": blocks of the query's own group of neighbours, in groups and in groups shifted by half: both
      halves of the heads of LongLoRA (arXiv 2309.12307) in one mask.
    - "harmonic": a band of half-width `w / d` between frames at distance `d`, whole frames at most: the decay
      of the radial mask without its steps of powers of two, its least width and its skipped frames, so that
      bands too narrow to fill a block end it. A definition of our own; none published was found.
    - "power": blocks at a distance of a power of two, and a window, as in PowerAttention (arXiv 2503.03588).
    - "random": in each row as many blocks, drawn with one seed.

    Raises:
        ValueError: none of the masks of this pattern is within `TOLERANCE` of that density; "power", which
            keeps all powers of two, is too dense on small grids.
    """
    target = radial_rule_mask(grid, config).density
    build, most = COMPARED[config.pattern](grid, config)
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (middle + 1, high) if _mask(grid, config, build(middle)).density < target else (low, middle)
        )
    masks = [_mask(grid, config, build(number)) for number in (max(low - 1, 0), low)]
    nearest = min(masks, key=lambda mask: abs(mask.density - target))
    if abs(nearest.density / target - 1) > TOLERANCE:
        raise ValueError(
            f"pattern must have a mask within {TOLERANCE:.0%} of the radial one's density {target:.3f} for "
            f"{grid.frames} x {grid.height} x {grid.width} tokens in blocks of {config.block_size}: "
            f"nearest {nearest.density:.3f}, got {config.pattern!r}"
        )
    return nearest


def _mask(grid: TokenGrid, config: RadialConfig, blocks: np.ndarray) -> BlockMask:
    """Blocks with what every mask keeps: diagonal, sink, text."""
    always = band_blocks(grid, config, lambda distance: None)
    return BlockMask(grid, config.block_size, torch.from_numpy(blocks | always))


Family = tuple[Callable[[int], np.ndarray], int]  # blocks `[Q, Q]` of a number, and the largest such number


def _spatial(grid: TokenGrid, config: RadialConfig) -> Family:
    frame = grid.tokens_per_frame

    def build(reach: int) -> np.ndarray:
        def width(distance: int) -> int | None:
            left = reach - distance * frame
            return None if left < 0 else min(left, frame)

        return band_blocks(grid, config, width)

    return build, grid.frames * frame


def _temporal(grid: TokenGrid, config: RadialConfig) -> Family:
    def build(number: int) -> np.ndarray:
        width, nearer = divmod(number, grid.frames)
        return band_blocks(grid, config, lambda distance: width + (distance < nearer))

    return build, grid.video_tokens


def _sliding_tile(grid: TokenGrid, config: RadialConfig) -> Family:
    radii = window_radii(grid, config.block_size)
    places = np.arange(len(radii))
    return _by_row(radii + TRIFLE * np.abs(places[:, None] - places))


def _by_row(scores: np.ndarray) -> Family:
    """In each row as many blocks, the lowest scores first; the rows' turns for one more are spread evenly."""
    count = len(scores)
    ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1)
    turns = (np.arange(count) * GOLDEN % 1).argsort().argsort()
    return lambda number: ranks * count + turns[:, None] < number, count**2


def _strided(grid: TokenGrid, config: RadialConfig) -> Family:
    places = np.arange(grid.num_blocks(config.block_size))

    def build(size: int) -> np.ndarray:
        groups = [places // (size + 1), (places + (size + 1) // 2) // (size + 1)]
        return np.any([group[:, None] == group for group in groups], axis=0)

    return build, len(places)


def _harmonic(grid: TokenGrid, config: RadialConfig) -> Family:
    frame = grid.tokens_per_frame

    def build(reach: int) -> np.ndarray:
        return band_blocks(
            grid, config, lambda distance: min(reach // distance, frame) if distance else frame
        )

    return build, grid.frames * frame


def _power(grid: TokenGrid, config: RadialConfig) -> Family:
    places = np.arange(grid.num_blocks(config.block_size))
    distance = np.abs(places[:, None] - places)
    powers = (distance & (distance - 1)) == 0
    return lambda window: powers | (distance <= window), len(places)


def _random(grid: TokenGrid, config: RadialConfig) -> Family:
    count = grid.num_blocks(config.block_size)
    order = np.random.default_rng(SEED).random((count, count)).argsort(axis=1).argsort(axis=1)
    return lambda number: order < number, count


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


COMPARED = {
    "spatial": _spatial,
    "temporal": _temporal,
    "sliding_tile": _sliding_tile,
    "strided": _strided,
    "harmonic": _harmonic,
    "power": _power,
    "random": _random,
}
