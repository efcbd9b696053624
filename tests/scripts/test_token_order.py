"""Blocks that get their video tokens in another order: the same dense output, the moved mask."""

import pytest
import torch

from radial_attn import radial_mask
from radial_attn.models import apply_radial_attention
from scripts.token_order import in_order, main
from tests.support.families import BY_NAME, DENSE, SPARSE, assert_near, masked_upstream, run
from tests.support.mask_oracle import places

SIZE = (3, 4, 9)


@pytest.mark.parametrize("order", ["tiles", "hilbert"])
@pytest.mark.parametrize("name", ["wan", "mochi", "hunyuan_video"])
def test_a_moved_model_gives_the_moved_result(name, order):
    family = BY_NAME[name]
    transformer, inputs = family.transformer(), family.sized(*SIZE)
    grid = family.grid(*SIZE)
    index = places(type(grid)(*SIZE, grid.text, order))
    moved = torch.empty(grid.tokens, grid.tokens, dtype=torch.bool)
    moved[index[:, None], index] = radial_mask(grid, SPARSE).token_mask()
    expected, dense = masked_upstream(family, transformer, inputs, SIZE, mask=moved), run(transformer, inputs)
    for config, wanted in ((DENSE, dense), (SPARSE, expected)):
        with in_order(transformer, order), apply_radial_attention(transformer, config):
            assert_near(run(transformer, inputs), wanted)
    assert not torch.allclose(expected, masked_upstream(family, transformer, inputs, SIZE), atol=1e-4)
    assert torch.equal(run(transformer, inputs), dense)


def test_the_table_of_orders(tmp_path, capsys):
    words = [f"generation.{word}" for word in ("num_frames=9", "height=32", "width=96", "steps=1")]
    words += ["attention.neighbour=0.5", "attention.decimation_width=16"]
    options = [*words, "--captions=1", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'a.md'}"]
    main(options)
    main(options)
    text = (tmp_path / "a.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| r", "| t", "| h"))]
    assert [row[0] for row in rows] == ["| raster", "| tiles", "| hilbert"] and rows[0][2] == "-"
    assert all(float(row[1]) > 5 for row in rows) and len({row[1] for row in rows}) == 3
    assert "python -m scripts.token_order generation.num_frames=9" in text
