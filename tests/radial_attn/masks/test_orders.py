"""Orders of the tokens in a frame: the rules are on the sequence, and what lies there follows the order."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.masks.draw import draw_mask
from tests.support.mask_oracle import block_rule, places

GRID = TokenGrid(4, 9, 12, text=7)
CONFIG = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=16)
orders = pytest.mark.parametrize("order", ["tiles", "hilbert"])


@orders
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, density=0.5), replace(CONFIG, pattern="sliding_tile")], ids=str
)
@pytest.mark.parametrize("far_field", ["none", "linear"])
def test_moved_tokens_give_the_moved_result(order, config, far_field):
    """Attention under the token mask of the order, moved to raster order."""
    grid = replace(GRID, order=order)
    mask, index = radial_mask(grid, config), places(grid)
    raster = torch.empty(grid.tokens, grid.tokens, dtype=torch.bool)
    raster[index[:, None], index] = mask.token_mask()
    tensors = torch.randn(3, 2, grid.tokens, 3, 8, generator=torch.Generator().manual_seed(0))
    moved = radial_attention(*tensors[:, :, index], mask, far_field=far_field)
    assert not torch.equal(raster, mask.token_mask())
    if far_field == "none":
        heads_first = tensors.transpose(2, 3)
        expected = scaled_dot_product_attention(*heads_first, attn_mask=raster).transpose(1, 2)
        torch.testing.assert_close(moved, expected[:, index], atol=1e-5, rtol=0)
    else:
        assert not torch.allclose(moved, radial_attention(*tensors, mask, far_field=far_field)[:, index])


@orders
def test_the_radial_rule_is_on_places_in_the_sequence(order):
    grid = replace(GRID, order=order)
    mask = radial_mask(grid, CONFIG)
    assert mask.grid == grid and mask is not radial_mask(GRID, CONFIG)
    assert torch.equal(mask.blocks, radial_mask(GRID, CONFIG).blocks)
    assert torch.equal(mask.blocks, block_rule(grid, CONFIG))


@orders
def test_a_picture_names_the_order(order):
    title = draw_mask(replace(GRID, order=order), CONFIG).axes[0].get_title(loc="left")
    assert f"4 frames of 9 × 12 tokens in {order} + 7 text" in title
