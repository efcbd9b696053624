"""Makes the masks of other published programs, block by block."""

from functools import lru_cache, partial
from itertools import product

import numpy as np
import torch

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .radial import COMPAT, RadialConfig, half_width, pair_blocks

PADDED, PAIRED = ("woct0rdho",), ("kijai", "woct0rdho")


def compat_mask(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """Makes the mask of the program `config.compat`, as its attention uses it, `blocks` bool `[Q, Q]`.

    All of them apply the radial rule (`half_width`) to each pair of frames, and keep a block by the same
    threshold as `radial_rule_mask`. They differ from it at the borders of frames and of the sequence:

    - a frame of `s` tokens is followed for `ceil(s / block)` blocks from the one in which it begins, so its
      end is lost if it begins late in a block; a short last block counts as a whole one;
    - the diagonal is kept only as far as the rule keeps it;
    - from the first block that is not all video on, every row and column of blocks is kept whole;
    - "woct0rdho" pads the sequence to whole blocks and divides the result by the number of frames, so frames
      may seem longer than they are; of each pair of frames it keeps the first and the last block, even if
      decimation drops the pair;
    - "kijai" and "woct0rdho", in blocks of 64, keep a block for both query blocks of a pair if one of them
      asks for it, because the query blocks of their kernel have 128 tokens.

    Only the mask is reproduced: some programs also let queries attend to padding, or drop a last block.

    Raises:
        ValueError: the program does not serve this grid, or its mask leaves queries without any key.
    """
    block, count = config.block_size, grid.num_blocks(config.block_size)
    _check_grid(grid, config)
    program = COMPAT[config.compat]
    rule = RadialConfig(config.decay_factor, block, **(program.text if grid.text else program.video))
    video = count * block if config.compat in PADDED else grid.video_tokens
    frame = video // grid.frames
    reach = -(-frame // block)
    pattern = lru_cache(maxsize=4096)(partial(pair_blocks, frame, block, last_rows=block))
    blocks = np.zeros((count, count), dtype=bool)
    for query, key in product(range(grid.frames), repeat=2):
        width = frame if key < rule.sink else half_width(abs(query - key), frame, rule)
        (row, above), (column, left) = divmod(query * frame, block), divmod(key * frame, block)
        target = blocks[row : row + reach, column : column + reach]
        if width is not None:
            target |= pattern(above, left, width=width)[:reach, :reach]
        if config.compat in PADDED:
            target[0, 0] = target[-1, -1] = True
    blocks[video // block :] = blocks[:, video // block :] = True
    if block == 64 and config.compat in PAIRED:
        blocks = (blocks[0::2] | blocks[1::2]).repeat(2, axis=0)
    empty = np.flatnonzero(~blocks.any(axis=1))
    if len(empty):
        raise ValueError(
            f"compat={config.compat!r} leaves queries of block {empty[0]} without a key in {_size(grid)}; "
            "choose another height or width, or compat='none'"
        )
    return BlockMask(grid, block, torch.from_numpy(blocks))


def _check_grid(grid: TokenGrid, config: RadialConfig) -> None:
    """Raises ValueError for a grid that the program does not serve."""
    block, reason = config.block_size, None
    if grid.text and COMPAT[config.compat].text is None:
        reason = "serves no sequence with text"
    elif config.compat == "kijai" and grid.tokens_per_frame % block:
        reason = f"needs frames of whole blocks of {block}"
    elif config.compat == "authors-2025-11" and grid.video_tokens % block:
        reason = f"needs a video of whole blocks of {block}"
    elif config.compat in PAIRED and block == 64 and grid.num_blocks(block) % 2:
        reason = "needs an even number of blocks of 64"
    if reason is not None:
        raise ValueError(f"compat={config.compat!r} {reason}, got {_size(grid)}; set compat='none'")


def _size(grid: TokenGrid) -> str:
    text = f" and {grid.text} text" if grid.text else ""
    return f"{grid.frames} x {grid.height} x {grid.width}{text} tokens"
