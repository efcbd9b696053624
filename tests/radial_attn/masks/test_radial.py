import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.masks.radial import half_width
from tests.support.mask_oracle import block_rule, equation_four, pair_rule, stored_masks, token_rule

TEXT = st.sampled_from([0, 0, 1, 17, 64])
GRIDS = st.builds(TokenGrid, st.integers(1, 10), st.integers(1, 9), st.integers(1, 11), TEXT)
GRIDS |= st.builds(TokenGrid, st.integers(11, 24), st.integers(1, 4), st.integers(1, 6), TEXT)
CONFIGS = st.builds(
    RadialConfig,
    decay_factor=st.sampled_from([0.05, 0.2, 0.5, 0.8, 0.95, 1.0, 1.7, 40.0]),
    block_size=st.sampled_from([16, 16, 32, 64]),
    sink=st.sampled_from([False, True, True, 2, 3]),
    neighbour=st.sampled_from(["full", "half", 1, 0.82, 0.5, 0.3, 0.07]),
    decimation_width=st.sampled_from([1, 7, 16, 50, 64, 128, "block"]),
)


@pytest.mark.parametrize(("meta", "expected"), list(stored_masks("reference_masks.npz")))
def test_equals_the_masks_of_the_authors(meta, expected):
    grid = TokenGrid(meta["frames"], 1, meta["tokens_per_frame"], meta["text"])
    config = RadialConfig(meta["decay_factor"], meta["block_size"], meta["sink"], meta["neighbour"])
    mask = radial_mask(grid, config)
    assert torch.equal(mask.blocks, expected)
    assert mask.density == pytest.approx(meta["density"], abs=1e-12)


@pytest.mark.parametrize(
    ("frames", "tokens_per_frame", "options", "sparsity"),
    [
        (64, 3600, {}, 80.8),  # HunyuanVideo 720p, 253 frames
        (128, 3600, {}, 88.3),  # HunyuanVideo 720p, 509 frames
        (56, 1590, {}, 76.4),  # Mochi 480p, 331 frames
        (112, 1590, {}, 85.5),  # Mochi 480p, 667 frames
        (18, 3840, {"decay_factor": 0.2, "neighbour": "half"}, 73.6),  # Wan2.1, 69 frames
    ],
)
def test_sparsity_is_that_of_the_paper(frames, tokens_per_frame, options, sparsity):
    mask = radial_mask(TokenGrid(frames, 1, tokens_per_frame), RadialConfig(**options))
    assert 100 * (1 - mask.density) == pytest.approx(sparsity, abs=0.1)


@settings(max_examples=150)
@given(GRIDS, CONFIGS)
def test_closed_form_equals_expanded_tokens(grid, config):
    assert torch.equal(radial_mask(grid, config).blocks, block_rule(grid, config))


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), CONFIGS)
def test_whole_blocks_pool_the_whole_token_mask(frames, blocks_per_frame, config):
    """With frames of whole blocks no block is shared: pooling all tokens at once must agree, too."""
    config = replace(config, block_size=16)
    grid = TokenGrid(frames, blocks_per_frame, 16)
    count = grid.num_blocks(16)
    tiles = token_rule(grid, config).view(count, 16, count, 16).sum(dim=1)
    filled, touched = (3 * tiles > 16).sum(-1), (tiles > 0).sum(-1)
    assert torch.equal(radial_mask(grid, config).blocks, 5 * filled > 3 * touched)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 8), st.sampled_from([0, 16, 40]), CONFIGS)
def test_symmetric_without_sink_on_whole_blocks(frames, blocks_per_frame, text, config):
    config = replace(config, block_size=16, sink=False)
    blocks = radial_mask(TokenGrid(frames, blocks_per_frame, 16, text), config).blocks
    assert torch.equal(blocks, blocks.T)


@settings(max_examples=60)
@given(GRIDS, CONFIGS)
def test_options_only_add_blocks(grid, config):
    blocks = radial_mask(grid, config).blocks
    for change in ({"sink": config.sink + 1}, {"neighbour": "full"}, {"pattern": "dense"}):
        assert (radial_mask(grid, replace(config, **change)).blocks | ~blocks).all()


@settings(max_examples=60)
@given(GRIDS, CONFIGS)
def test_neighbour_in_words_is_neighbour_in_numbers(grid, config):
    for word, share in (("full", 1.0), ("half", 0.5)):
        masks = [radial_mask(grid, replace(config, neighbour=value)) for value in (word, share)]
        assert torch.equal(masks[0].blocks, masks[1].blocks)


@settings(max_examples=60)
@given(GRIDS, CONFIGS, st.floats(0.01, 1), st.floats(1, 3))
def test_wider_bands_only_add_blocks(grid, config, share, wider):
    narrow = replace(config, neighbour=share)
    wide = replace(config, neighbour=min(share * wider, 1.0), decay_factor=config.decay_factor * wider)
    if share * grid.tokens_per_frame >= config.block_size:
        assert (radial_mask(grid, wide).blocks | ~radial_mask(grid, narrow).blocks).all()


@given(GRIDS, st.sampled_from([16, 64, 128]))
def test_dense_pattern_keeps_everything(grid, block_size):
    mask = radial_mask(grid, RadialConfig(block_size=block_size, pattern="dense"))
    assert mask.is_dense
    assert mask.density == 1.0


@pytest.mark.parametrize(("frames", "blocks_per_frame"), [(1, 1), (9, 2), (20, 4), (40, 1)])
def test_covers_equation_four(frames, blocks_per_frame):
    """For `s` a power of two, decay 1 and decimation 1, no token pair of eq. 4 is lost."""
    config = RadialConfig(block_size=16, decimation_width=1)
    mask = radial_mask(TokenGrid(frames, blocks_per_frame, 16), config)
    assert (mask.token_mask() | ~equation_four(frames, 16 * blocks_per_frame)).all()


@pytest.mark.parametrize(("frames", "tokens_per_frame"), [(2, 5), (16, 16), (30, 12), (64, 8), (40, 33)])
def test_equation_four_stays_below_its_bound(frames, tokens_per_frame):
    kept = int(equation_four(frames, tokens_per_frame, sink=False).sum())
    assert kept <= 4 * tokens_per_frame**2 * frames * math.log2(frames)


def test_kept_pairs_grow_as_n_log_n():
    counts = [64, 128, 256, 512]
    masks = [radial_mask(TokenGrid(f, 16, 32), RadialConfig(block_size=64)) for f in counts]
    ratio = [mask.kept_pairs / (f * math.log2(f)) for f, mask in zip(counts, masks, strict=True)]
    assert max(ratio) / min(ratio) < 1.25


@pytest.mark.parametrize("tokens_per_frame", [1, 37, 64, 100, 256])
@pytest.mark.parametrize("config", [RadialConfig(0.3, 16), RadialConfig(2.0, 16, decimation_width=16)])
def test_half_width_describes_the_token_band(tokens_per_frame, config):
    for distance in range(40):
        width = half_width(distance, tokens_per_frame, replace(config, sink=False))
        first_row = pair_rule(distance, 0, tokens_per_frame, replace(config, sink=False))[0]
        assert int(first_row.sum()) == (0 if width is None else min(width + 1, tokens_per_frame))


def test_thresholds_are_those_of_float_arithmetic():
    """60 % in float32, as torch computes it, and the integers of the closed form agree for any block."""
    touched = torch.arange(1, 257)[:, None]
    filled = torch.arange(257)[None, :]
    assert torch.equal(filled / (touched + 1e-9) > 0.6, 5 * filled > 3 * touched)
    for size in (16, 32, 64, 128, 256):
        kept = torch.arange(size + 1)
        assert torch.equal(kept / size > 1 / 3, kept >= size // 3 + 1)


def test_short_last_block_counts_its_true_rows():
    """8 rows of 64 are no third of a block, but they are all of the last one."""
    grid = TokenGrid(frames=3, height=6, width=12)
    assert grid.block_tokens(64).tolist() == [64, 64, 64, 24]
    blocks = radial_mask(grid, RadialConfig(block_size=64, decimation_width=1, sink=False)).blocks
    assert blocks[-1].tolist() == [True, True, True, True]


def test_a_frame_is_followed_past_the_last_whole_block_it_would_fill():
    """Frames of 63 tokens in blocks of 16: the neighbours are whole, wherever a frame begins."""
    grid = TokenGrid(frames=2, height=7, width=9)
    assert radial_mask(grid, RadialConfig(block_size=16, decimation_width=1)).is_dense


def test_equal_arguments_return_the_same_mask():
    first = radial_mask(TokenGrid(4, 4, 8), RadialConfig(block_size=32))
    assert radial_mask(TokenGrid(4, 4, 8), RadialConfig(block_size=32)) is first
    assert radial_mask(TokenGrid(4, 8, 4), RadialConfig(block_size=32)) is not first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_factor": 0.0}, "decay_factor must be a finite number above 0, got 0.0"),
        ({"decay_factor": float("nan")}, "decay_factor must be .* got nan"),
        ({"decay_factor": "1"}, "decay_factor must be .* got '1'"),
        ({"block_size": 100}, r"block_size must be one of \(16, 32, 64, 128, 256\), got 100"),
        ({"sink": "yes"}, "sink must be an integer >= 0, got 'yes'"),
        ({"sink": -1}, "sink must be an integer >= 0, got -1"),
        ({"neighbour": "none"}, r"neighbour must be one of \('full', 'half'\) or a number .* got 'none'"),
        ({"neighbour": 0.0}, r"neighbour must be .* a number in \(0, 1\], got 0.0"),
        ({"neighbour": True}, "neighbour must be .* got True"),
        ({"neighbour": 1.2}, "neighbour must be .* got 1.2"),
        ({"density": 0}, r"density must be None or a number in \(0, 1\], got 0"),
        ({"density": float("nan")}, "density must be .* got nan"),
        ({"density": "0.3"}, "density must be .* got '0.3'"),
        ({"decimation_width": 0}, "decimation_width must be an integer >= 1, got 0"),
        ({"decimation_width": "frame"}, "decimation_width must be an integer >= 1 or 'block', got 'frame'"),
        ({"pattern": "banded"}, r"pattern must be one of \('radial', 'dense', .*\), got 'banded'"),
        ({"compat": "authors"}, r"compat must be one of \('none', 'authors-2025-06', .*\), got 'authors'"),
        (
            {"compat": "kijai", "neighbour": "half"},
            "neighbour must be left out with compat='kijai', .* 'half'",
        ),
        ({"compat": "kijai", "sink": True}, "sink must be left out with compat='kijai', .* got True"),
        ({"compat": "kijai", "density": 0.3}, "density must be left out with compat='kijai', .* got 0.3"),
        (
            {"compat": "woct0rdho", "pattern": "power"},
            "pattern must be 'radial' or 'dense' with .* got 'power'",
        ),
        ({"compat": "kijai", "block_size": 16}, r"block_size must be one of \(64, 128\) with .*, got 16"),
        ({"compat": "lightx2v", "decay_factor": 1.0}, "decay_factor must be 0.2 with .*lightx2v.*, got 1.0"),
        ({"compat": "kijai", "decay_factor": -1}, "decay_factor must be a finite number above 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RadialConfig(**options)
