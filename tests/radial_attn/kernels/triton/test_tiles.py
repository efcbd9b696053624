"""Lists of tiles against the token mask: every kept pair in one listed tile, whole tiles whole."""

import pytest
import torch

from radial_attn import BlockMask, TokenGrid
from radial_attn.kernels.triton.tiles import Extent, Tiles, key_tiles, query_tiles
from tests.support.attention_cases import make_mask

CPU = torch.device("cpu")


def of(mask: BlockMask, *, padded: bool = False) -> tuple[torch.Tensor, Extent]:
    """Returns the first arguments of the functions that list tiles."""
    grid = mask.grid
    return mask.blocks, Extent(grid.tokens, mask.block_size, grid.video_tokens if padded else grid.tokens)


def expand(tiles: Tiles, step: int, across: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts the listed whole and mixed tiles on tokens, int `[H, S, S]`; rows are the side that lists."""
    actual = torch.zeros(2, len(tiles.offsets), tokens, tokens, dtype=torch.int32)
    for head, offsets in enumerate(tiles.offsets.tolist()):
        for tile, (whole, mixed, end) in enumerate(offsets):
            for kind, listed in enumerate((tiles.starts[whole:mixed], tiles.starts[mixed:end])):
                assert listed.tolist() == sorted(listed.tolist())
                for start in listed.tolist():
                    rows = slice(tile * step, (tile + 1) * step)
                    actual[kind, head, rows, start : start + across] += 1
    return actual[0], actual[1]


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("text", [0, 11])
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 32), (32, 128)])
def test_lists_cover_the_mask_once(rows, columns, block_size, text, heads):
    grid = TokenGrid(9, 8, 8, text)
    mask = make_mask(grid, block_size, heads)
    kept = mask.token_mask().view(-1, grid.tokens, grid.tokens)
    for tiles, wanted, step, across in (
        (query_tiles(*of(mask), rows, columns, CPU), kept, rows, columns),
        (key_tiles(*of(mask), rows, columns, CPU), kept.mT, columns, rows),
    ):
        whole, mixed = expand(tiles, step, across, grid.tokens)
        assert (whole + mixed).max() <= 1
        assert ((whole + mixed) > 0)[wanted].all()
        assert wanted[whole > 0].all()
        if tiles.patterns is None:
            assert wanted[mixed > 0].all()


def test_text_and_the_end_of_the_sequence_are_mixed():
    grid = TokenGrid(2, 8, 8, text=70)
    mask = BlockMask.from_blocks(grid, torch.ones(4, 4, dtype=torch.bool), 64)
    whole = query_tiles(*of(mask), 64, 64, CPU)
    assert [int(b - a) for a, b in whole.offsets[0, :, :2]] == [3, 3, 3, 0]  # only the short end is mixed
    tiles = query_tiles(*of(mask, padded=True), 64, 64, CPU)
    assert tiles.patterns is None
    starts = [tiles.starts[a:b].tolist() for a, b in tiles.offsets[0, :, :2].tolist()]
    assert starts == [[0, 64], [0, 64], [0, 64], []]
    assert tiles.starts[tiles.offsets[0, 0, 1] : tiles.offsets[0, 0, 2]].tolist() == [128, 192]


def test_lists_are_made_once():
    mask = make_mask(TokenGrid(4, 8, 8), 64)
    assert query_tiles(*of(mask), 64, 64, CPU) is query_tiles(*of(mask), 64, 64, CPU)
    assert query_tiles(*of(mask), 64, 64, CPU) is not key_tiles(*of(mask), 64, 64, CPU)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 16), (16, 128), (128, 128)])
def test_patterns_are_the_blocks_of_a_tile(rows, columns, heads):
    mask = make_mask(TokenGrid(9, 8, 8, text=11), 16, heads)
    blocks = mask.blocks.view(-1, *mask.blocks.shape[-2:])
    across = columns // 16
    for tiles, transposed in (
        (query_tiles(*of(mask), rows, columns, CPU), 0),
        (key_tiles(*of(mask), rows, columns, CPU), 1),
    ):
        for head, listed in enumerate(tiles.offsets.tolist()):
            for tile, (first, _, end) in enumerate(listed):
                for start, pattern in zip(tiles.starts[first:end], tiles.patterns[first:end], strict=True):
                    row, column = (
                        (start // 16, tile * across) if transposed else (tile * rows // 16, start // 16)
                    )
                    held = blocks[head, row : row + rows // 16, column : column + across]
                    for (i, j), kept in zip(
                        held.new_ones(held.shape).nonzero().tolist(), held.flatten(), strict=True
                    ):
                        assert bool(int(pattern) >> (i * across + j) & 1) == bool(kept)
