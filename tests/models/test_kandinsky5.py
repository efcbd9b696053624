"""Kandinsky 5 with NABLA, its own sparse attention: tokens in tiles, another mask."""

import pytest
import torch

from radial_attn import TokenGrid, radial_mask
from radial_attn.models import apply_radial_attention
from tests.support.families import BY_NAME, DENSE, FULL, SPARSE, assert_near, masked_upstream, run
from tests.support.mask_oracle import places
from tests.support.tiny_kandinsky import SPARSE_PARAMS

KANDINSKY, SIZE = BY_NAME["kandinsky5"], (3, 8, 24)
TILES = TokenGrid(*SIZE, order="tiles")


@pytest.mark.parametrize("batch", [1, 2])
def test_radial_attention_takes_the_place_of_nabla(batch):
    """The model without NABLA, in raster order, is the reference: dense, and under the moved mask."""
    transformer, inputs = KANDINSKY.transformer(), KANDINSKY.sized(*SIZE, batch=batch)
    index = places(TILES)
    moved = torch.empty(TILES.tokens, TILES.tokens, dtype=torch.bool)
    moved[index[:, None], index] = radial_mask(TILES, SPARSE).token_mask()
    dense = run(transformer, inputs)
    sparse = masked_upstream(KANDINSKY, transformer, inputs, SIZE, mask=moved)
    in_raster = masked_upstream(KANDINSKY, transformer, inputs, SIZE)
    assert min((sparse - other).abs().max() for other in (dense, in_raster)) > 1e-3
    nabla = inputs | {"sparse_params": dict(SPARSE_PARAMS)}
    for config, expected in ((DENSE, dense), (FULL, dense), (SPARSE, sparse)):
        with apply_radial_attention(transformer, config):
            assert_near(run(transformer, nabla), expected)
    with apply_radial_attention(transformer, SPARSE, dense_steps=1):
        assert_near(run(transformer, nabla), dense)
    assert nabla["sparse_params"] == SPARSE_PARAMS


def test_the_order_follows_each_call():
    transformer, inputs = KANDINSKY.transformer(), KANDINSKY.sized(*SIZE)
    options = {"selection": "dense_step", "dense_steps": 1}
    for given, order in ((SPARSE_PARAMS, "tiles"), (None, "raster")):
        with apply_radial_attention(transformer, SPARSE, **options) as handle:
            for time in (1000.0, 500.0):
                run(transformer, inputs | {"timestep": torch.tensor([time]), "sparse_params": given})
            assert handle.chosen(0).grid == TokenGrid(*SIZE, order=order)
