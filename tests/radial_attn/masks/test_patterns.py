"""Masks to compare with: what they keep, and that they are as dense as the radial one."""

from dataclasses import replace

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.masks.density import resolve_density
from radial_attn.masks.patterns import COMPARED, axis_radii, tile_shape, window_radii
from tests.support.mask_oracle import places as in_sequence

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
    actual = radial_mask(grid, replace(config, pattern=pattern))
    assert actual.density == pytest.approx(wanted, rel=0.05)
    assert actual.blocks.diagonal().all()
    text = grid.video_tokens // config.block_size
    if grid.text:
        assert actual.blocks[text:].all() and actual.blocks[:, text:].all()
    assert actual.blocks[:, : grid.tokens_per_frame // config.block_size].all()  # the sink
    solved = resolve_density(grid, replace(config, pattern=pattern, density=0.5))
    assert solved.pattern == pattern and radial_mask(grid, solved).density == pytest.approx(0.5, rel=0.05)


def test_a_grid_without_a_mask_about_as_dense():
    """All powers of two are 0.88 of the 5 blocks a row; the radial mask keeps 0.36."""
    grid, config = TokenGrid(5, 4, 4), replace(TOY, pattern="power")
    message = r"0\.360 for 5 x 4 x 4 .*nearest 0\.880: choose another pattern.* got 'power'"
    with pytest.raises(ValueError, match=f"^pattern must have a mask within 5%.* {message}$"):
        radial_mask(grid, config)
    assert radial_mask(grid, replace(config, pattern="strided")).density == pytest.approx(0.36)


def test_spatial_keeps_near_frames():
    """Four blocks a frame of 64 tokens: whole frames near the diagonal, nothing far but the sink."""
    blocks = mask("spatial", TokenGrid(33, 8, 8)).view(33, 4, 33, 4)
    whole = [distance for distance in range(32) if blocks[32 - distance, :, 32].all()]
    assert whole == list(range(len(whole))) and len(whole) >= 3
    assert not blocks[32, :, 1 : 32 - len(whole)].any()


def test_temporal_keeps_the_own_position_in_every_frame():
    blocks = mask("temporal", *GRIDS[2]).view(18, 30, 18, 30)
    for index in range(30):
        assert blocks[:, index, :, index].all()
    assert not blocks[5, :6, 17, 24:].any() and not blocks[17, 24:, 5, :6].any()


@pytest.mark.parametrize("pattern", ["sliding_tile", "harmonic"])
@pytest.mark.parametrize(("grid", "config"), [*GRIDS, (TokenGrid(9, 8, 8), TOY)], ids=str)
def test_density_within_two_percent(pattern, grid, config):
    actual = radial_mask.__wrapped__(grid, replace(config, pattern=pattern))
    assert actual.density == pytest.approx(radial_mask(grid, config).density, rel=0.02)
    again = radial_mask.__wrapped__(grid, replace(config, pattern=pattern))
    assert torch.equal(actual.blocks, again.blocks)


def windows_by_tokens(grid: TokenGrid, block: int) -> torch.Tensor:
    """Computes `window_radii` token by token: what windows of 1, 3, 5, ... tiles leave out of a block."""
    sides = (grid.frames, grid.height, grid.width)
    places = torch.cartesian_prod(*[torch.arange(size) for size in sides]) // torch.tensor(tile_shape(block))
    places = places[in_sequence(grid)[: grid.video_tokens]]
    outside = torch.zeros(len(places), len(places))
    for radius in range(max(sides)):
        inside = torch.ones_like(outside, dtype=torch.bool)
        for axis, last in zip(places.T, places.amax(dim=0), strict=True):
            first = (axis - radius).clamp(max=last - 2 * radius).clamp(min=0)[:, None]
            inside &= (first <= axis) & (axis <= first + 2 * radius)
        outside += ~inside
    count = grid.num_blocks(block)
    rows = torch.arange(len(places)) // block
    of_block = torch.nn.functional.one_hot(rows, count).float() / rows.bincount(minlength=count)[rows, None]
    return of_block.T @ outside @ of_block


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(9, 8, 8),
        TokenGrid(7, 6, 11),
        TokenGrid(10, 5, 9, 20),
        TokenGrid(5, 9, 12, 3, order="tiles"),
        TokenGrid(5, 9, 12, order="hilbert"),
    ],
    ids=str,
)
def test_windows_of_tiles_against_single_tokens(grid):
    """Tiles cut short at the far borders, frames that begin inside a block, text in the last blocks."""
    actual, wanted = torch.from_numpy(window_radii(grid, 16)), windows_by_tokens(grid, 16)
    count = -(-grid.video_tokens // 16)
    assert torch.allclose(actual[:count, :count].float(), wanted[:count, :count], atol=1e-5)


def test_windows_move_inwards_at_borders():
    assert axis_radii(5).tolist()[0] == [0, 1, 1, 2, 2] and axis_radii(5).tolist()[2] == [2, 1, 0, 1, 2]
    assert tile_shape(128) == (6, 8, 8) and tile_shape(16) == (3, 4, 4)


def test_sliding_tile_keeps_the_same_count_in_the_nearest_windows():
    grid, config = TokenGrid(33, 8, 8), replace(TOY, sink=False)
    blocks = mask("sliding_tile", grid, config)
    counts = blocks.sum(dim=1)
    assert counts.max() - counts.min() <= 1
    radii = torch.from_numpy(window_radii(grid, 16))
    for row, kept in zip(radii, blocks, strict=True):
        assert row[kept].max() <= row[~kept].min() + 1e-6


def test_harmonic_narrows_with_frame_distance():
    """Half-width w / d: if a frame of distance d keeps its corners, so do all nearer ones."""
    blocks = mask("harmonic", GRIDS[2][0], replace(REAL, sink=False)).view(18, 30, 18, 30)
    kept = [int(blocks[0, 15, distance].sum()) for distance in range(18)]
    assert kept == sorted(kept, reverse=True) and kept[0] == 30 and kept[17] >= 1
    reach = 128 * (kept[4] // 2)
    for distance in (8, 12, 16):
        assert abs(128 * (kept[distance] // 2) - 4 * reach / distance) <= 128


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
