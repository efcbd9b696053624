"""The Triton kernels against the definition, run by Triton's interpreter.

Only in a process of its own with TRITON_INTERPRET=1, which test_op.py starts. float16 and float32: the
interpreter's bfloat16 products are wrong.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.block_mask import Part
from radial_attn.kernels.triton import configs as triton_configs
from radial_attn.kernels.triton import op as triton_op
from radial_attn.kernels.triton import tiles
from radial_attn.kernels.triton.configs import Launch
from scripts.benchmarks.speed_model import launch_order
from tests.support.attention_cases import GRIDS, compare, compare_forward, make_inputs, make_mask, run
from tests.support.far_cases import bias_for, defined, some_mask
from tests.support.partial_cases import agree, make, some_blocks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/radial_attn/kernels/triton/test_op.py"
)


long = pytest.mark.long


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, torch.float32),
        (96, torch.float16),
        pytest.param(64, torch.float16, marks=long),
        pytest.param(96, torch.float32, marks=long),
        pytest.param(128, torch.float32, marks=long),
        (128, torch.float16),
    ],
)
def test_forward_and_backward(width, dtype):
    grid = GRIDS[63]
    compare("triton", make_inputs(grid, 1, 2, width), make_mask(grid), dtype)


@pytest.mark.parametrize(
    "lengths", [pytest.param(None, marks=long), [0, 11], pytest.param([4, 7], marks=long)]
)
def test_text_padding(lengths):
    grid = GRIDS[111]
    inputs, mask = make_inputs(grid, 2, 1, 64), make_mask(grid)
    compare("triton", inputs, mask, torch.float32, text_lengths=lengths)


def test_rows_of_padded_text_are_zero():
    grid = GRIDS[111]
    inputs, mask = make_inputs(grid, 2, 1, 64), make_mask(grid)
    out, *grads = run("triton", inputs, mask, torch.float16, text_lengths=[4, 11])
    for tensor in (out, *grads):
        assert not tensor[0, 104:].any() and tensor[1, 104:].any()


@pytest.mark.parametrize(
    ("grid", "block_size", "heads"),
    [
        (TokenGrid(4, 5, 5, text=5), 16, 3),  # a pattern for each head, more than one block of each size
        (TokenGrid(3, 6, 6, text=5), 64, None),
        pytest.param(TokenGrid(4, 9, 9, text=5), 64, 3, marks=long),
        (TokenGrid(4, 6, 6, text=5), 128, 3),
        pytest.param(TokenGrid(4, 9, 9, text=5), 128, 3, marks=long),
        pytest.param(TokenGrid(4, 9, 9, text=5), 256, 3, marks=long),
        pytest.param(TokenGrid(6, 9, 9, text=10), 64, None, marks=long),
    ],
    ids=str,
)
def test_block_sizes_and_a_mask_per_head(grid, block_size, heads):
    mask = make_mask(grid, block_size, heads=heads)
    compare("triton", make_inputs(grid, 1, heads or 1, 64), mask, torch.float16)


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(1, 3, 4), TokenGrid(2, 8, 8), pytest.param(TokenGrid(2, 16, 16), marks=long)],
    ids=["one block", "dense", "many blocks"],
)
def test_dense_masks(grid):
    mask = radial_mask(grid, RadialConfig(block_size=64, pattern="dense"))
    compare("triton", make_inputs(grid, 1, 1, 64), mask, torch.float32)


def test_strided_inputs_and_scale():
    """Cuts query, key and value out of one tensor, as fused projections leave them."""
    grid = GRIDS[63]
    whole = torch.randn(2, grid.tokens, 2, 3 * 64, dtype=torch.float16)
    query, key, value = whole.split(64, dim=-1)
    actual, plain = (
        radial_attention(query, key, value, make_mask(grid), backend=name, scale=0.3)
        for name in ("triton", "reference")
    )
    assert torch.allclose(actual, plain, atol=2e-3)


def test_uninitialised_memory_is_never_read(poison):
    grid = GRIDS[111]
    for tensor in run("triton", make_inputs(grid, 2, 1, 64), make_mask(grid), torch.float16):
        assert tensor.isfinite().all()


def test_second_call_makes_no_lists(monkeypatch):
    grid = GRIDS[63]
    inputs, mask = make_inputs(grid, 1, 1, 64), make_mask(grid)
    first = run("triton", inputs, mask, torch.float16)
    monkeypatch.setattr(tiles, "_cut", None)
    second = run("triton", inputs, mask, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("quantize", "lengths"),
    [
        (None, [4, 11]),
        ("int8", None),
        pytest.param(None, None, marks=long),
        pytest.param("int8", [4, 11], marks=long),
    ],
    ids=str,
)
def test_compiles_into_one_graph(quantize, lengths):
    grid = GRIDS[111]
    inputs, mask = make_inputs(grid, 2, 1, 64), BlockMask.from_blocks(grid, make_mask(grid).blocks, 16)
    query, key, value = (x.half() for x in inputs[:3])
    counts = None if lengths is None else torch.tensor(lengths)

    def attend(query, key, value, counts):
        options = {"backend": "triton", "quantize": quantize, "text_lengths": counts}
        return radial_attention(2 * query, key, value, mask, **options) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    actual = compiled(query, key, value, counts)
    assert torch.allclose(actual, attend(query, key, value, counts), atol=1e-3)
    assert len(mask.blocks.__dict__["tiles"]) == 1  # compiled or not, the mask keeps the same lists


@pytest.mark.parametrize("bits", [None, "int8"])
def test_operator_contract(bits):
    """Checks schema, fake tensors and autograd registration with torch's checker."""
    from radial_attn.kernels.triton.quantized import quantized_attention

    grid = GRIDS[63]
    tensors = [x.requires_grad_(bits is None) for x in make_inputs(grid, 1, 1, 64)[:3]]
    arguments = *tensors, make_mask(grid).blocks, 16, grid.video_tokens, None, 0.125
    if bits:
        torch.library.opcheck(quantized_attention, (*arguments, bits))
    else:
        torch.library.opcheck(triton_op.triton_attention, arguments)


@contextmanager
def reading_keys(chosen: tuple[str, bool]) -> Iterator[None]:
    """Launches with another way of reading keys and values."""
    reading = dict.fromkeys(("forward", "far field"), Launch(64, 32, 4, 1, *chosen))
    launches = triton_configs.INTERPRETED | reading
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_configs, "INTERPRETED", launches)
        triton_configs.launch.cache_clear()
        yield
    triton_configs.launch.cache_clear()


@pytest.mark.parametrize("chosen", [("whole", False), ("head", True)], ids=["host", "kernel"])
@pytest.mark.parametrize(("block_size", "text"), [(16, 11), (64, 0)])
def test_tensor_descriptors(block_size, text, chosen):
    """Reads keys and values through descriptors of the host, or of the kernel with one loop for all tiles.

    The backward knows no descriptors.
    """
    grid = TokenGrid(2, 8, 8, text)
    tensors, mask = make_inputs(grid, 1, 2, 64), make_mask(grid, block_size)
    with reading_keys(chosen):
        compare_forward(triton_op, tensors, mask, torch.float32, [3] if text else None)


FAR_CASES = [  # grid, patterns, text lengths, block size, head width, descriptors
    (GRIDS[111], 2, [0, 4], 16, 64, ""),  # the last block holds video and text
    (TokenGrid(4, 9, 9, text=5), None, [3], 128, 128, "head"),  # blocks larger than a tile of rows
    (TokenGrid(9, 10, 6), None, None, 16, 96, "whole"),  # 34 means: more than a tile of them
]


@pytest.mark.parametrize(
    ("case", "far_field"),
    [(FAR_CASES[0], "linear"), (FAR_CASES[1], "mean"), (FAR_CASES[2], "linear")]
    + [
        pytest.param(case, name, marks=long)
        for case, name in zip(FAR_CASES, ("mean", "linear", "mean"), strict=True)
    ],
    ids=str,
)
def test_far_field(case, far_field):
    """Dropped blocks enter in the kernel; "linear" with a bias for each sample, head and pair of blocks."""
    grid, patterns, lengths, size, width, descriptors = case
    batch, heads = len(lengths or [0]), patterns or 1
    inputs, mask = make_inputs(grid, batch, heads, width)[:3], some_mask(grid, size, patterns, share=0.1)
    assert mask.density < 0.9
    bias = bias_for(mask, batch, heads) if far_field == "linear" else None
    options = {"text_lengths": lengths, "far_bias": bias, "scale": 0.15, "far_field": far_field}
    with reading_keys((descriptors, False)):
        out = radial_attention(*inputs, mask, backend="triton", **options)
    wanted = defined(inputs, mask, far_field, bias=bias, lengths=lengths, scale=0.15)
    torch.testing.assert_close(out.double(), wanted, atol=5e-6, rtol=0)


@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_gradients_of_a_far_field(far_field):
    *inputs, grad = make_inputs(GRIDS[63], 1, 2, 64)
    inputs, mask = [x.requires_grad_() for x in inputs], some_mask(GRIDS[63], 16, 2)
    options = {"scale": 0.15, "far_field": far_field}
    out = radial_attention(*inputs, mask, backend="triton", **options)
    wanted = torch.autograd.grad(defined(inputs, mask, **options), inputs, grad.double())
    for actual, exact in zip(torch.autograd.grad(out, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(actual, exact, atol=5e-6, rtol=0)


@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_far_field_in_float16(far_field):
    inputs, mask = [x.half() for x in make_inputs(GRIDS[111], 1, 1, 64)[:3]], some_mask(GRIDS[111], 16)
    out = radial_attention(*inputs, mask, backend="triton", far_field=far_field)
    wanted = defined(inputs, mask, far_field, scale=0.125)
    torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=0)


READINGS, LENGTHS = [("", False), ("whole", False), ("head", True)], [None, [0, 7], [3, 7]]
PARTS = [((45, 87), (7, 7)), ((96, 40), (0, 7)), ((40, 64), (7, 0))]


@pytest.mark.parametrize(
    ("sizes", "texts", "lengths", "chosen"),
    [  # each pair of sizes, lengths and readings is in a quick case
        pytest.param(*PARTS[i], LENGTHS[j], READINGS[k], marks=[] if (i + j + k) % 3 == 0 else long)
        for i, j, k in product(range(3), repeat=3)
    ],
    ids=str,
)
def test_a_part_of_the_keys(sizes, texts, lengths, chosen):
    """Gives rows and keys different lengths and text, under every way of reading keys."""
    with reading_keys(chosen):
        agree("triton", make(*sizes, heads=2, width=64), Part(some_blocks(*sizes), 16, *texts), lengths)


@pytest.mark.parametrize("size", [16, 64, 128])
def test_parts_of_heads_with_patterns_of_their_own(size):
    blocks = some_blocks(150, 270, 2, size)
    blocks[1] = False
    tensors = [x.half() for x in make(150, 270, heads=2, batch=1, width=64)]
    agree("triton", tensors, Part(blocks, size))
    agree("triton", tensors, Part(torch.zeros_like(blocks), size))


def test_gradient_through_the_log_sum_exp():
    """As a ring of devices needs it, which weighs parts of the keys by their log-sum-exp."""
    grid, mask = GRIDS[63], make_mask(GRIDS[63])
    leaves = [x.requires_grad_() for x in make_inputs(grid, 1, 2, 64)[:3]]
    out, lse = triton_op.triton_attention(*leaves, mask.blocks, 16, grid.video_tokens, None, 0.125)
    actual = torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)
    scores = torch.einsum("bqhd,bkhd->bhqk", *leaves[:2]) * 0.125
    scores = scores.masked_fill(~mask.token_mask(), -torch.inf)
    plain = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), leaves[2])
    wanted = torch.autograd.grad(plain.square().sum() + scores.logsumexp(-1).sin().sum(), leaves)
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("index", [0, 1, 2], ids=["query", "key", "value"])
def test_values_that_are_not_finite_come_out(index, quantize):
    """The output check must find them, so no row may hide one as zeros."""
    grid, mask = GRIDS[63], make_mask(GRIDS[63])
    for bad in (torch.nan, torch.inf):
        tensors = make_inputs(grid, 1, 2, 64)[:3]
        tensors[index][0, 20, 0, 3] = bad
        out = radial_attention(*tensors, mask, backend="triton", quantize=quantize)
        assert not out[0, 20, 0].isfinite().all()
        assert out[0, :, 1].isfinite().all()


def test_unaligned_tensors_are_copied_for_descriptors():
    from radial_attn.kernels.triton.launch import aligned

    even = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
    odd = torch.zeros(8 * 2 * 64 + 1, dtype=torch.float16)[1:].view(even.shape)
    assert aligned(even) is even
    assert aligned(odd).data_ptr() % 16 == 0 and torch.equal(aligned(odd), odd)


def test_the_order_of_programs_is_the_one_that_is_simulated():
    from tests.support.program_order import order_kernel

    for by_key in (False, True):
        out = torch.zeros(37, dtype=torch.int32)
        order_kernel[37,](out, BY_KEY=by_key)
        assert out.tolist() == launch_order(37, by_key)
