from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.density import solve_density
from radial_attn.selection import floor_blocks
from radial_attn.shards import deal
from tests.support.mask_oracle import PROGRAMS, program_rule, stored_masks

GRIDS = st.builds(TokenGrid, st.integers(1, 6), st.integers(1, 12), st.integers(8, 24), st.just(0))
GRIDS |= st.builds(
    TokenGrid, st.integers(1, 6), st.sampled_from([2, 4, 6, 8]), st.just(16), st.sampled_from([0, 1, 64, 100])
)


@pytest.mark.parametrize(("meta", "expected"), list(stored_masks("compat_masks.npz")))
def test_equals_the_mask_that_the_program_made(meta, expected):
    """The newest of the authors' programs attends to text apart from the blocks: all of it is kept."""
    grid = TokenGrid(meta["frames"], 1, meta["tokens_per_frame"], meta["text"])
    config = RadialConfig(meta["decay_factor"], meta["block_size"], compat=meta["compat"])
    blocks = radial_mask(grid, config).blocks
    end = len(expected)
    assert torch.equal(blocks[:end, :end], expected)
    assert end in (len(blocks), grid.video_tokens // meta["block_size"])
    assert blocks[end:].all() and blocks[:, end:].all()


@settings(max_examples=150, deadline=None)
@given(GRIDS, st.sampled_from(list(PROGRAMS)), st.sampled_from([64, 128]), st.sampled_from([0.2, 0.8, 3.0]))
def test_equals_the_rule_on_expanded_tokens(grid, name, block_size, decay_factor):
    if name == "lightx2v":
        block_size, decay_factor = 128, 0.2
    config = RadialConfig(decay_factor, block_size, compat=name)
    expected = program_rule(grid, name, block_size, decay_factor)
    if expected is None:
        with pytest.raises(ValueError, match=f"compat='{name}'"):
            radial_mask(grid, config)
    else:
        assert torch.equal(radial_mask(grid, config).blocks, expected)


@pytest.mark.parametrize("text", [0, 100])
@pytest.mark.parametrize("name", PROGRAMS)
def test_with_frames_of_whole_blocks_a_program_is_a_set_of_options(name, text):
    """Not so for the one that keeps the corners of each pair of frames."""
    grid, options = TokenGrid(9, 16, 24, text), PROGRAMS[name][text > 0]
    if options is None:
        with pytest.raises(ValueError, match="serves no sequence with text, got 9 x 16 x 24 and 100 text"):
            radial_mask(grid, RadialConfig(compat=name))
        return
    theirs = radial_mask(grid, RadialConfig(0.2, compat=name)).blocks
    ours = radial_mask(grid, RadialConfig(0.2, **options)).blocks
    assert (theirs | ~ours).all()
    assert torch.equal(theirs, ours) == (name != "woct0rdho")


@pytest.mark.parametrize(
    ("name", "grid", "block_size", "message"),
    [
        (
            "kijai",
            TokenGrid(4, 10, 10),
            64,
            "frames of whole blocks of 64, got 4 x 10 x 10 tokens; set compat",
        ),
        ("kijai", TokenGrid(3, 8, 8), 64, "needs an even number of blocks of 64"),
        ("woct0rdho", TokenGrid(3, 8, 8), 64, "needs an even number of blocks of 64"),
        ("authors-2025-11", TokenGrid(5, 10, 10, 28), 64, "needs a video of whole blocks of 64"),
        (
            "authors-2025-06",
            TokenGrid(16, 8, 31),
            128,
            "queries of block .* without a key in 16 x 8 x 31 tok",
        ),
    ],
)
def test_a_grid_that_a_program_does_not_serve(name, grid, block_size, message):
    with pytest.raises(ValueError, match=f"compat='{name}' .*{message}"):
        radial_mask(grid, RadialConfig(block_size=block_size, compat=name))


def test_the_options_that_a_program_fixes_stay_none():
    config = RadialConfig(compat="kijai")
    assert (config.sink, config.neighbour, config.decimation_width) == (None, None, None)
    assert config.decay_factor == 0.2
    assert replace(config, decay_factor=0.5).compat == "kijai"
    assert RadialConfig(**asdict(config)) == config
    assert replace(config, compat="none") == RadialConfig(0.2)


def test_what_else_reads_the_options():
    config, grid = RadialConfig(compat="authors-2025-06"), TokenGrid(4, 8, 16, 10)
    assert torch.equal(floor_blocks(grid, config), floor_blocks(grid, RadialConfig()))
    assert radial_mask(grid, replace(config, pattern="dense")).is_dense
    shared = deal(grid, 128, 2).kept(radial_mask(grid, config))
    assert shared.sum() == radial_mask(grid, config).blocks.sum()
    with pytest.raises(ValueError, match="compat must be 'none' to solve for a density, got 'authors-2025"):
        solve_density(grid, config, 0.5)
