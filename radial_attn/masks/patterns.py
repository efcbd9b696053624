"""Builds other static masks for comparison: as dense as the radial mask of the same options, and as simple.

Each has one number that makes it denser. The number is chosen to come nearest to the radial mask's density.
Sink, text and the diagonal are kept as in the radial mask.
"""

from collections.abc import Callable
from math import prod

import numpy as np
import torch

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .radial import RadialConfig, band_blocks, radial_rule_mask

TOLERANCE = 0.05  # relative difference from the radial mask's density
SEED = 0  # seeds the random mask
GOLDEN = 0.5 * (5**0.5 - 1)  # its multiples, modulo 1, are spread evenly
TILE = (6, 8, 8)  # the authors' tokens of a tile in time, height and width
TILE_BLOCK = 128  # three such blocks make a tile
TRIFLE = 1e-9  # puts the nearer of two otherwise equal blocks first


def compared_mask(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """Builds the mask of `config.pattern`, one of `COMPARED`, as dense as the radial mask of these options.

    - "spatial" keeps whole frames up to a frame distance, and a band in the frames one further: attention to
      what is near in time, as in the spatial heads of Sparse VideoGen (arXiv 2502.01776).
    - "temporal" keeps in every frame a band around the query's position, a token wider up to some distance,
      as in the temporal heads of Sparse VideoGen.
    - "sliding_tile" keeps equally many blocks in each row, the ones in the smallest windows: cubes of 1, 3,
      5, ... tiles around the query's tile, moved inwards at the borders, as in Sliding Tile Attention
      (arXiv 2502.04507). There a block is a tile; here it is a run of tokens in the grid's order, so it
      counts by the share of its token pairs that each window holds (`window_radii`).
    - "strided" keeps the blocks of the query's group of neighbours, in groups and in groups shifted by half:
      both halves of the heads of LongLoRA (arXiv 2309.12307) in one mask.
    - "harmonic" keeps a band of half-width `w / d` between frames at distance `d`, whole frames at most. It
      decays as the radial mask does, but without steps of powers of two, a least width or skipped frames:
      it ends at bands too narrow to fill a block. This is our own definition; we found none published.
    - "power" keeps blocks at power-of-two distances, and a window, as in PowerAttention (arXiv 2503.03588).
    - "random" keeps equally many blocks in each row, drawn with one seed.

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
            f"pattern must have a mask within {TOLERANCE:.0%} of the radial density {target:.3f} for "
            f"{grid.frames} x {grid.height} x {grid.width} tokens in blocks of {config.block_size} "
            f"(nearest {nearest.density:.3f}: choose another pattern), got {config.pattern!r}"
        )
    return nearest


def _mask(grid: TokenGrid, config: RadialConfig, blocks: np.ndarray) -> BlockMask:
    """Adds to the blocks what every mask keeps: diagonal, sink, text."""
    always = band_blocks(grid, config, lambda distance: None)
    return BlockMask(grid, config.block_size, torch.from_numpy(blocks | always))


Family = tuple[Callable[[int], np.ndarray], int]  # maps a number to blocks `[Q, Q]`; the largest number


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
    """Ranks the blocks of each row by radius; rows take turns for one more block, spread evenly."""
    radii = window_radii(grid, config.block_size)
    count, numbers = len(radii), np.arange(len(radii))
    scores = radii + TRIFLE * np.abs(numbers[:, None] - numbers)
    ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1)
    turns = (numbers * GOLDEN % 1).argsort().argsort()
    return lambda number: ranks * count + turns[:, None] < number, count**2


def _strided(grid: TokenGrid, config: RadialConfig) -> Family:
    numbers = np.arange(grid.num_blocks(config.block_size))

    def build(size: int) -> np.ndarray:
        groups = [numbers // (size + 1), (numbers + (size + 1) // 2) // (size + 1)]
        return np.any([group[:, None] == group for group in groups], axis=0)

    return build, len(numbers)


def _harmonic(grid: TokenGrid, config: RadialConfig) -> Family:
    frame = grid.tokens_per_frame

    def build(reach: int) -> np.ndarray:
        return band_blocks(
            grid, config, lambda distance: min(reach // distance, frame) if distance else frame
        )

    return build, grid.frames * frame


def _power(grid: TokenGrid, config: RadialConfig) -> Family:
    numbers = np.arange(grid.num_blocks(config.block_size))
    distance = np.abs(numbers[:, None] - numbers)
    powers = (distance & (distance - 1)) == 0
    return lambda window: powers | (distance <= window), len(numbers)


def _random(grid: TokenGrid, config: RadialConfig) -> Family:
    count = grid.num_blocks(config.block_size)
    order = np.random.default_rng(SEED).random((count, count)).argsort(axis=1).argsort(axis=1)
    return lambda number: order < number, count


def tile_shape(block: int) -> tuple[int, ...]:
    """Scales the authors' tile to hold about three blocks; returns its tokens in time, height and width."""
    return tuple(round(side * (block / TILE_BLOCK) ** (1 / 3)) for side in TILE)


def axis_radii(count: int) -> np.ndarray:
    """Returns the least radius of the window around one tile of an axis that holds another.

    A window of radius r has 2 r + 1 tiles; at the borders it is moved inwards, not cut.

    Returns:
        int `[count, count]`.
    """
    tiles = np.arange(count)
    radii = np.zeros((count, count), dtype=int)
    for radius in range(count // 2 + 1):
        first = np.clip(tiles - radius, 0, max(count - 1 - 2 * radius, 0))[:, None]
        radii += (tiles < first) | (tiles > first + 2 * radius)
    return radii


def window_radii(grid: TokenGrid, block: int) -> np.ndarray:
    """Returns the radius of the cube of tiles around a query that holds a key, mean over two blocks' pairs.

    This equals the sum, over the windows of radius 0, 1, 2, ..., of the share of token pairs that each leaves
    out. Tiles at the far borders of the grid may be short.

    Returns:
        float64 `[Q, Q]` of query and key blocks, in tiles; 0 for blocks of text alone.
    """
    sides = (grid.frames, grid.height, grid.width)
    counts = tuple(-(-size // side) for size, side in zip(sides, tile_shape(block), strict=True))
    tokens = np.unravel_index(grid.raster_index[: grid.video_tokens].numpy(), sides)
    tiles = tuple(axis // side for axis, side in zip(tokens, tile_shape(block), strict=True))
    shape = grid.num_blocks(block), prod(counts)
    cells = np.arange(grid.video_tokens) // block * shape[1] + np.ravel_multi_index(tiles, counts)
    # tokens that each block has in each tile, [Q, tiles]
    members = np.bincount(cells, minlength=prod(shape)).reshape(shape).astype(np.float32)
    axes = zip(np.unravel_index(np.arange(prod(counts)), counts), counts, strict=True)
    radii = np.max([axis_radii(count)[tile[:, None], tile] for tile, count in axes], axis=0)
    pairs = np.outer(*[members.sum(axis=1)] * 2)
    return (members @ radii.astype(np.float32) @ members.T) / np.maximum(pairs, 1).astype(np.float64)


COMPARED = {
    "spatial": _spatial,
    "temporal": _temporal,
    "sliding_tile": _sliding_tile,
    "strided": _strided,
    "harmonic": _harmonic,
    "power": _power,
    "random": _random,
}
