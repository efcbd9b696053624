import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radial_attn import TokenGrid
from radial_attn.grid import ORDERS
from tests.support.mask_oracle import places

SIZES = st.integers(1, 50)


def test_counts_of_wan_default():
    grid = TokenGrid(frames=18, height=48, width=80)
    assert (grid.tokens_per_frame, grid.video_tokens, grid.tokens) == (3840, 69120, 69120)
    assert grid.num_blocks(128) == 540
    assert (grid.block_tokens(128) == 128).all()


def test_text_follows_the_video():
    grid = TokenGrid(frames=3, height=5, width=7, text=9)
    assert grid.video_tokens == 105
    assert grid.tokens == 114
    assert grid.block_tokens(32).tolist() == [32, 32, 32, 18]


@given(SIZES, SIZES, SIZES, st.integers(0, 300), st.integers(1, 300))
def test_blocks_cover_every_token_once(frames, height, width, text, block_size):
    grid = TokenGrid(frames, height, width, text)
    tokens = grid.block_tokens(block_size)
    assert tokens.dtype == torch.int64
    assert len(tokens) == grid.num_blocks(block_size)
    assert int(tokens.sum()) == grid.tokens
    assert 1 <= int(tokens[-1]) <= block_size
    assert (tokens[:-1] == block_size).all()


def test_equal_grids_are_one_key():
    assert len({TokenGrid(2, 3, 4), TokenGrid(2, 3, 4, text=0), TokenGrid(2, 4, 3)}) == 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(2, 16, 24, 3), (1, 1, 1), (3, 5, 9), (2, 20, 3, 1), (1, 16, 16)], ids=str)
def test_the_order_of_the_tokens(order, size):
    grid = TokenGrid(*size, order=order)
    assert torch.equal(grid.raster_index, places(grid))
    assert torch.equal(grid.raster_index.sort().values, torch.arange(grid.tokens))


def test_a_hilbert_curve_goes_from_neighbour_to_neighbour():
    index = TokenGrid(1, 16, 16, order="hilbert").raster_index
    steps = (index // 16).diff().abs() + (index % 16).diff().abs()
    assert (steps == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 4), "frames must be an integer >= 1, got 0"),
        ((2, -1, 4), "height must be an integer >= 1, got -1"),
        ((2, 3, 4.0), "width must be an integer >= 1, got 4.0"),
        ((2, 3, True), "width must be an integer >= 1, got True"),
        ((2, 3, 4, -5), "text must be an integer >= 0, got -5"),
        ((2, 3, 4, 0, "rows"), "order must be one of .'raster', 'tiles', 'hilbert'., got 'rows'"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid(*arguments)


def test_bad_block_size_is_named():
    with pytest.raises(ValueError, match="block_size must be an integer >= 1, got 0"):
        TokenGrid(2, 3, 4).num_blocks(0)
