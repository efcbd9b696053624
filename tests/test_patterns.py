"""Masks to compare with: what they keep, and that they are as dense as the radial one."""

from dataclasses import replace

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.density import resolve_density
from radial_attn.patterns import COMPARED

TOY = RadialConfig(decay_factor=0.5, block_size=16, decimation_width=64)
REAL = RadialConfig(decay_factor=0.95)
GRIDS = [
    (TokenGrid(33, 8, 8), TOY),
    (TokenGrid(17, 12, 20, 40), replace(REAL, block_size=32)),
    (TokenGrid(18, 48, 80), REAL),
]


def mask(pattern: str, grid: TokenGrid, config: RadialConfig = TOY) -> torch.Tensor:
    return radial_mask(grid, replace(config, pattern=pattern)).blocks


@pytest.mark.parametrize("pattern", COMPARED)
@pytest.mark.parametrize(("grid", "config"), GRIDS, ids=str)
def test_as_dense_as_the_radial_mask(pattern, grid, config):
    wanted = radial_mask(grid, config).density
    found = radial_mask(grid, replace(config, pattern=pattern))
    assert found.density == pytest.approx(wanted, rel=0.05)
    assert found.blocks.diagonal().all()
    text = grid.video_tokens // config.block_size
    if grid.text:
        assert found.blocks[text:].all() and found.blocks[:, text:].all()
    assert found.blocks[:, : grid.tokens_per_frame // config.block_size].all()  # the sink
    solved = resolve_density(grid, replace(config, pattern=pattern, density=0.5))
    assert solved.pattern == pattern and radial_mask(grid, solved).density == pytest.approx(0.5, rel=0.05)


def test_spatial_keeps_near_frames():
    """Four blocks a frame of 64 tokens: whole frames near the diagonal, nothing far but the sink."""
    blocks = mask("spatial", TokenGrid(33, 8, 8)).view(33, 4, 33, 4)
    whole = [distance for distance in range(32) if blocks[32 - distance, :, 32].all()]
    assert whole == list(range(len(whole))) and len(whole) >= 3
    assert not blocks[32, :, 1 : 32 - len(whole)].any()


def test_temporal_keeps_the_own_position_in_every_frame():
    blocks = mask("temporal", *GRIDS[2]).view(18, 30, 18, 30)
    for place in range(30):
        assert blocks[:, place, :, place].all()
    assert not blocks[5, :6, 17, 24:].any() and not blocks[17, 24:, 5, :6].any()


def test_strided_keeps_groups_and_shifted_groups():
    blocks = mask("strided", TokenGrid(33, 8, 8), replace(TOY, sink=False))
    sizes = {int(row.nonzero().max() - row.nonzero().min()) + 1 for row in blocks}
    assert max(sizes) <= 2 * min(sizes) and not blocks[0, -1]
    assert torch.equal(blocks, blocks.T)


def test_power_keeps_powers_of_two():
    blocks = mask("power", TokenGrid(33, 8, 8), replace(TOY, sink=False))
    kept = blocks[0].nonzero().flatten().tolist()
    window = next(i for i in range(132) if i not in kept) - 1
    assert [i for i in kept if i > window] == [2**k for k in range(8) if window < 2**k < 132]


def test_random_is_one_draw():
    grid = TokenGrid(33, 8, 8)
    blocks = mask("random", grid, replace(TOY, sink=False))
    assert torch.equal(
        blocks, radial_mask.__wrapped__(grid, replace(TOY, sink=False, pattern="random")).blocks
    )
    counts = blocks.sum(dim=1)
    assert counts.max() - counts.min() <= 1  # the diagonal
    assert not torch.equal(blocks, blocks.T)


@pytest.mark.parametrize("pattern", COMPARED)
def test_backends_take_them(pattern):
    grid = TokenGrid(9, 8, 8)
    compared = radial_mask(grid, replace(TOY, pattern=pattern))
    query, key, value = torch.randn(3, 1, grid.tokens, 2, 16).unbind(0)
    outputs = [
        radial_attention(query, key, value, compared, backend=name) for name in ("reference", "blocks")
    ]
    assert torch.allclose(*outputs, atol=1e-5)
