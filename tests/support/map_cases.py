"""Makes grids, masks and tensors whose whole attention maps fit in memory."""

import math

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_mask

CONFIG = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=16)

GRIDS = [TokenGrid(5, 4, 7), TokenGrid(6, 5, 5, text=9), TokenGrid(6, 3, 9, order="tiles")]

LENGTHS = {0: None, 9: torch.tensor([9, 4])}


grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def tensors(grid: TokenGrid, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Returns query, key and value of two samples and three heads with steep attention."""
    generator = torch.Generator().manual_seed(0)
    shape = 2, grid.tokens, 3, 8
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]


def whole_softmax(query, key, grid, lengths) -> torch.Tensor:
    """Returns `[B, H, S, S]` in float64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) * query.shape[-1] ** -0.5
    if lengths is not None:
        beyond = torch.arange(grid.tokens) >= grid.video_tokens + lengths[:, None]
        scores = scores.masked_fill(beyond[:, None, None], -math.inf)
    return scores.softmax(-1)


def head_masks(grid: TokenGrid) -> BlockMask:
    """Makes a mask with a random pattern for each of three heads."""
    count = grid.num_blocks(16)
    blocks = torch.rand(3, count, count, generator=torch.Generator().manual_seed(1)) < 0.4
    return BlockMask.from_blocks(grid, blocks | torch.eye(count, dtype=torch.bool), 16)


masks = pytest.mark.parametrize(
    "make", [lambda grid: radial_mask(grid, CONFIG), head_masks], ids=["one", "heads"]
)
