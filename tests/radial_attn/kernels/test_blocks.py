"""The kernels of the CPU against the definition, forward and backward, and the plans of `blocks`."""

from functools import partial

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.kernels.blocks import rectangles
from radial_attn.kernels.blocks.plan import Layout, plan_attention
from radial_attn.kernels.cpp.build import load_library
from radial_attn.kernels.cpp.op import SOURCE
from tests.support.attention_cases import (
    GRIDS,
    assert_as_good_as,
    compare,
    exact,
    make_inputs,
    make_mask,
    run,
)
from tests.support.auto_backend import AUTO

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("one_thread")
kernels = pytest.mark.parametrize("backend", sorted({"blocks", AUTO}))  # and that in C++ if it compiles


needs_cpp = pytest.mark.skipif(isinstance(load_library(SOURCE), str), reason="no C++ compiler")
typed = pytest.mark.parametrize(  # cpp computes in float32 only; other types are in test_cpp.py
    ("backend", "dtype"),
    [*(("blocks", dtype) for dtype in DTYPES), pytest.param("cpp", torch.float32, marks=needs_cpp)],
)


@typed
@pytest.mark.parametrize("width", [1, 10, 12, 16, 48, 64, 96, 128])
@pytest.mark.parametrize("tokens", GRIDS)
def test_equals_definition(tokens, width, backend, dtype, poison):
    grid = GRIDS[tokens]
    batch, heads = (1, 1) if tokens == 1000 else (1 + width % 3, 2)
    compare(backend, make_inputs(grid, batch, heads, width), make_mask(grid), dtype)


@typed
@pytest.mark.parametrize("lengths", [[0, 0], [11, 11], [0, 11], [4, 9], [5, 5]])
def test_padded_text(lengths, backend, dtype, poison):
    grid = GRIDS[111]
    compare(backend, make_inputs(grid, 2, 3, 12), make_mask(grid), dtype, text_lengths=lengths)


@kernels
@pytest.mark.parametrize("lengths", [None, [0, 3, 10], [10, 3, 3]])
@pytest.mark.parametrize("heads", [1, 4])
def test_mask_per_head(backend, heads, lengths, poison):
    grid = GRIDS[1000]
    inputs = make_inputs(grid, 3, heads, 16)
    compare(backend, inputs, make_mask(grid, 32, heads), torch.float32, text_lengths=lengths)


@kernels
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("grid", [TokenGrid(12, 8, 8, text=9), TokenGrid(5, 11, 13), TokenGrid(6, 8, 16)])
def test_block_sizes(backend, grid, block_size, poison):
    lengths = [grid.text // 2] * 2 if grid.text else None
    mask = make_mask(grid, block_size)
    compare(backend, make_inputs(grid, 2, 2, 16), mask, torch.float32, text_lengths=lengths)


@kernels
def test_padding_that_leaves_a_row_without_keys(backend):
    grid = TokenGrid(1, 4, 8, text=32)
    blocks = torch.eye(4, dtype=torch.bool)
    blocks[0] = torch.tensor([0, 0, 0, 1])
    inputs = make_inputs(grid, 1, 2, 16)
    mask = BlockMask.from_blocks(grid, blocks, 16)
    compare(backend, inputs, mask, torch.float32, text_lengths=[16])
    assert not run(backend, inputs, mask, torch.float32, text_lengths=[16])[0][:, :16].any()


@kernels
def test_padded_rows_are_zeros_and_padding_is_not_read(backend):
    grid = GRIDS[111]
    query, key, value, _ = make_inputs(grid, 2, 2, 16)
    options = {"mask": make_mask(grid), "backend": backend, "text_lengths": [3, 7]}
    before = radial_attention(query, key, value, **options)
    for sample, length in enumerate((3, 7)):
        assert not before[sample, 100 + length :].any()
        for tensor in (query, key, value):
            tensor[sample, 100 + length :] = torch.nan
    assert torch.equal(radial_attention(query, key, value, **options), before)


@kernels
def test_inputs_unchanged_and_any_strides(backend):
    grid, mask = GRIDS[1000], make_mask(GRIDS[1000])
    packed = torch.randn(2, 4, grid.tokens, 3, 16).permute(3, 0, 2, 1, 4)
    copy = packed.clone()
    query, key, value = packed
    assert not query.is_contiguous()
    out = radial_attention(query, key, value, mask, backend=backend)
    assert torch.equal(packed, copy)
    assert torch.equal(out, radial_attention(*copy.contiguous(), mask, backend=backend))


@kernels
def test_scale(backend):
    grid, mask = GRIDS[63], make_mask(GRIDS[63])
    query, key, value, _ = make_inputs(grid, 1, 2, 16)
    scaled = radial_attention(query * 3, key, value, mask, backend=backend, scale=0.25 / 3)
    torch.testing.assert_close(scaled, radial_attention(query, key, value, mask, backend=backend))


@pytest.mark.parametrize("lengths", [None, [0, 6]])
def test_path_of_other_devices(lengths):
    """Runs what a device without SDPA's CPU kernel runs: no merged rows, gradients through SDPA again."""
    grid, mask = GRIDS[111], make_mask(GRIDS[111])
    inputs = make_inputs(grid, 2, 2, 16)
    truth = exact(inputs, mask, torch.float32, text_lengths=lengths)
    reference = run("reference", inputs, mask, torch.float32, text_lengths=lengths)
    plan = plan_attention(mask.blocks, Layout(16, tail=grid.video_tokens // 16, merge=False))
    assert not any(group.merge for group in plan)
    for sample, length in enumerate(lengths or [11, 11]):
        query, key, value, grad = (x[sample : sample + 1] for x in inputs)
        tensors, size, limit = (query, key, value), 16, grid.video_tokens + length
        out, lse = rectangles.forward_plan(
            tensors, plan, size, limit, partial(rectangles.dense_any, scale=0.25)
        )
        backward = partial(rectangles.dense_any_backward, scale=0.25)
        grads = rectangles.backward_plan((grad, *tensors, out, lse), plan, size, limit, backward)
        one = slice(sample, sample + 1)
        assert_as_good_as([out, *grads], [x[one] for x in reference], [x[one] for x in truth])


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("grid, block_size", [(TokenGrid(16, 12, 12), 16), (TokenGrid(32, 8, 16, 50), 64)])
def test_a_plan_covers_each_kept_block_once(grid, block_size, merge):
    config = RadialConfig(block_size=block_size, decimation_width="block")
    wanted = radial_mask(grid, config).blocks
    wanted[5] = False  # as in a part of a mask
    covered = torch.zeros_like(wanted, dtype=torch.int64)
    plan = plan_attention(wanted, Layout(block_size, tail=len(wanted) - 1, merge=merge))
    assert any(group.merge for group in plan) == merge
    for group in plan:
        for piece in group.pieces:
            assert torch.equal(group.rows.blocks[0][piece.slots.blocks], piece.rows.blocks)
            for rows, keys in zip(piece.rows.blocks, piece.keys.blocks, strict=True):
                covered[rows.unsqueeze(1), keys] += 1
    assert torch.equal(covered, wanted.long())


@pytest.mark.parametrize("block_size, heads", [(16, None), (64, None), (128, 3)])
def test_merged_parts_of_few_keys(block_size, heads, poison):
    grid = TokenGrid(9, 10, 11, text=10)
    mask = make_mask(grid, block_size, heads)
    inputs = make_inputs(grid, 2, 1, 16)
    query, key, value, grad = inputs
    mask = mask if heads is None else BlockMask.from_blocks(grid, mask.blocks[2], block_size)
    lengths, limit = [4, 4], grid.video_tokens + 4
    # so many bytes a key that calls take a few blocks only
    layout = Layout(block_size, tail=grid.video_tokens // block_size, key_bytes=4096)
    truth = exact(inputs, mask, torch.float32, text_lengths=lengths)
    reference = run("reference", inputs, mask, torch.float32, text_lengths=lengths)
    plan = plan_attention(mask.blocks, layout)
    assert all(group.merge for group in plan)
    dense = partial(rectangles.dense_cpu, scale=0.25)
    out, lse = rectangles.forward_plan(inputs[:3], plan, block_size, limit, dense)
    backward = partial(rectangles.dense_cpu_backward, scale=0.25)
    grads = rectangles.backward_plan((grad, query, key, value, out, lse), plan, block_size, limit, backward)
    assert_as_good_as([out, *grads], reference, truth)


def test_neighbours_with_equal_key_sets_are_one_call():
    blocks = torch.ones(8, 8, dtype=torch.bool)
    blocks[:4, 6:] = False
    plan = plan_attention(blocks, Layout(128, tail=8, merge=False))
    shapes = [tuple(piece.rows.blocks.shape) for group in plan for piece in group.pieces]
    assert shapes == [(1, 4), (1, 4)]


def test_memory_of_the_backward_does_not_grow_with_kept_blocks():
    grid = TokenGrid(16, 16, 16)
    query, key, value, _ = make_inputs(grid, 1, 2, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        radial_attention(query.requires_grad_(), key, value, make_mask(grid, 64), backend="blocks")
    assert sum(saved) <= 5 * query.numel()
