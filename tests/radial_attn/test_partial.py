"""Attention over a part of the keys against the token mask, and how parts add up to the whole."""

import pytest
import torch

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.block_mask import Part
from radial_attn.partial import merge, partial_attention
from tests.support.partial_cases import agree, make, some_blocks

SIZES = [(40, 70), (64, 32), (5, 100), (97, 16)]  # rows and keys, last blocks short or whole


@pytest.mark.parametrize("backend", ["blocks", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rectangles(sizes, heads, dtype, backend):
    tensors = [x.to(dtype) for x in make(*sizes)]
    agree(backend, tensors, Part(some_blocks(*sizes, heads), 16))


@pytest.mark.parametrize("backend", ["blocks", "reference"])
@pytest.mark.parametrize("lengths", [[7, 7], [0, 5], [3, 7]], ids=str)
@pytest.mark.parametrize(("row_text", "key_text"), [(7, 7), (0, 7), (7, 0)])
def test_padded_text_on_either_side(row_text, key_text, lengths, backend):
    sizes = 45, 67
    part = Part(some_blocks(*sizes), 16, row_text, key_text)
    agree(backend, make(*sizes), part, lengths)


def test_nothing_kept():
    part = Part(torch.zeros(3, 5, dtype=torch.bool), 16)
    out, lse = partial_attention(*make(40, 70), part)
    assert not out.any() and (lse == -torch.inf).all()


def test_a_head_that_keeps_nothing():
    blocks = some_blocks(40, 70, 3)
    blocks[1] = False
    agree("blocks", make(40, 70), Part(blocks, 16))


def test_many_tokens_and_large_blocks():
    """Takes enough rows and keys for groups that merge several rectangles."""
    sizes = 2500, 3100
    agree("blocks", make(*sizes, heads=2, batch=1), Part(some_blocks(*sizes, size=128), 128))
    agree("blocks", make(*sizes, heads=2, batch=1), Part(torch.ones(20, 25, dtype=torch.bool), 128))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_mask_add_up(dtype, heads):
    """Cuts rows and keys of a square mask into three parts of blocks that are not neighbours."""
    grid = TokenGrid(4, 9, 9, text=11)
    count = grid.num_blocks(16)
    blocks = some_blocks(grid.tokens, grid.tokens, heads) | torch.eye(count, dtype=torch.bool)
    mask, lengths = BlockMask.from_blocks(grid, blocks, 16), torch.tensor([4, 11])
    tensors = [torch.randn(2, grid.tokens, 2, 16).to(dtype) for _ in range(3)]
    wanted = radial_attention(*tensors, mask, backend="reference", text_lengths=lengths)
    shards = [torch.arange(offset, count, 3) for offset in range(3)]
    tokens = [torch.arange(grid.tokens)[torch.isin(torch.arange(grid.tokens) // 16, x)] for x in shards]
    for rows, row_tokens in zip(shards, tokens, strict=True):
        whole = None
        for keys, key_tokens in zip(shards, tokens, strict=True):
            texts = [(x >= grid.video_tokens).sum().item() for x in (row_tokens, key_tokens)]
            texts = [text if text == grid.text else 0 for text in texts]
            part = Part(mask.blocks[..., rows[:, None], keys], 16, *texts)
            given = tensors[0][:, row_tokens], tensors[1][:, key_tokens], tensors[2][:, key_tokens]
            out, lse = partial_attention(*given, part, text_lengths=lengths)
            whole = (out.float(), lse) if whole is None else merge(whole, (out, lse))
        atol = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(whole[0], wanted[:, row_tokens].float(), atol=atol, rtol=0)


def test_merge_without_keys():
    """Neither side, one side and both sides have keys: no NaN, and values that are NaN come out."""
    nothing = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -torch.inf)
    something = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1)
    assert all(torch.equal(*pair) for pair in zip(merge(nothing, nothing), nothing, strict=True))
    for pair in (nothing, something), (something, nothing):
        assert all(torch.equal(*x) for x in zip(merge(*pair), something, strict=True))
    out, lse = merge(something, something)
    torch.testing.assert_close(out, something[0])
    torch.testing.assert_close(lse, something[1] + torch.tensor(2.0).log())
    bad = torch.full_like(something[0], torch.nan), torch.full_like(something[1], torch.nan)
    assert merge(something, bad)[0].isnan().all() and merge(bad, something)[0].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "flex"}, "backend 'flex' .*allowed here: auto, reference, blocks"),
        ({"backend": "other"}, "backend must be one of"),
        ({"query": torch.randn(2, 40, 3)}, r"query must be \[B, Q, H, D\]"),
        ({"key": torch.randn(2, 70, 2, 16)}, r"key must be \[2, K, 3, 16\]"),
        ({"value": torch.randn(2, 60, 3, 16)}, r"value must be \[2, K, 3, 16\]"),
        ({"value": torch.randn(2, 70, 3, 16).half()}, "value must be torch.float32 on cpu"),
        ({"query": torch.randn(2, 40, 3, 16, requires_grad=True)}, "no gradients over a part of the keys"),
        ({"part": Part(torch.ones(2, 5, dtype=torch.bool), 16)}, r"blocks must be \[3, 5\] or \[3, 3, 5\]"),
        ({"part": Part(torch.ones(3, 5, dtype=torch.bool), 16, 50)}, "text must be at most the 40 rows"),
        ({"text_lengths": torch.tensor([1])}, r"text_lengths must be int64 \[2\]"),
    ],
)
def test_bad_input(change, message):
    given = dict(zip(("query", "key", "value"), make(40, 70), strict=True))
    given |= {"part": Part(some_blocks(40, 70), 16), **change}
    with pytest.raises(ValueError, match=message):
        partial_attention(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 5), 16), r"blocks must be bool \[Q, K\]"),
        ((torch.ones(3, 5, dtype=torch.bool), 17), "block_size must be one of"),
        ((torch.ones(3, 5, dtype=torch.bool), 16, 3, 4), "row_text and key_text must agree, got 3 and 4"),
    ],
)
def test_parts_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Part(*arguments)
