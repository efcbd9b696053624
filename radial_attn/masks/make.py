"""Makes any mask, and holds the one cache of masks."""

from functools import lru_cache

import torch

from ..block_mask import BlockMask
from ..grid import TokenGrid
from .compat import compat_mask
from .density import resolve_density
from .patterns import compared_mask
from .radial import RadialConfig, radial_rule_mask


@lru_cache(maxsize=32)
def radial_mask(grid: TokenGrid, config: RadialConfig) -> BlockMask:
    """Makes the mask of a grid: the radial rule, that of another program, or another pattern of `config`.

    Returns:
        A shared `BlockMask`, `blocks` bool `[Q, Q]`. Equal arguments return the same object.

    Raises:
        ValueError: no mask of this grid has `config.density` (the message says which densities there are),
            no mask of another `config.pattern` is about as dense as the radial one, or `config.compat` serves
            no such grid.
    """
    if config.pattern == "dense":
        count = grid.num_blocks(config.block_size)
        return BlockMask(grid, config.block_size, torch.ones(count, count, dtype=torch.bool, device="cpu"))
    if config.density is not None:
        return radial_mask(grid, resolve_density(grid, config))
    if config.compat != "none":
        return compat_mask(grid, config)
    return (radial_rule_mask if config.pattern == "radial" else compared_mask)(grid, config)
