"""The sage backend against emulations of its libraries, and against the libraries themselves on a GPU."""

from functools import partial

import pytest
import torch

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.analysis.sampled_error import output_error
from radial_attn.dispatch import missing
from radial_attn.kernels import reference
from radial_attn.kernels import sage as kernel
from tests.support import kernel_emulations
from tests.support.attention_cases import (
    GRIDS,
    assert_near,
    attend,
    compare_forward,
    fresh_mask,
    make_inputs,
    make_mask,
)
from tests.support.kernel_emulations import assert_promised, install

WIDTH = 64
CPU = torch.device("cpu")
ALIGNED = TokenGrid(4, 8, 10, text=64)  # 384 tokens
DTYPES = (torch.float16, torch.bfloat16)
HOPPER = (64, 128)


new_mask = partial(fresh_mask, block_size=128)


def dense_mask(grid: TokenGrid, block_size: int = 128) -> BlockMask:
    count = grid.num_blocks(block_size)
    return BlockMask(grid, block_size, torch.ones(count, count, dtype=torch.bool))


def on_hopper(monkeypatch) -> None:
    shapes = {"spas_sage_attn": HOPPER, "sparse_sageattn": (128, 64)}
    monkeypatch.setattr(kernel, "block_shape", lambda library, device: shapes[library])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("block_size", [128, 256])
@pytest.mark.parametrize("hopper", [False, True], ids=["128x64", "64x128"])
def test_spas_odd_sizes(monkeypatch, hopper, block_size, heads, dtype):
    library = kernel_emulations.spas_sage_attn(*HOPPER if hopper else (128, 64))
    install(monkeypatch, library)
    if hopper:
        on_hopper(monkeypatch)
    mask = new_mask(GRIDS[1000], block_size=block_size, heads=heads)
    compare_forward(kernel, make_inputs(mask.grid, 2, 3, WIDTH), mask, dtype)
    assert len(library.calls) == 1 and library.calls[0][1] == 1e6


@pytest.mark.parametrize("lengths", [[0, 10], [3, 7]])
@pytest.mark.parametrize("heads", [None, 2])
def test_spas_padded_text(monkeypatch, heads, lengths):
    install(monkeypatch, kernel_emulations.spas_sage_attn())
    mask = new_mask(GRIDS[1000], heads=heads)
    inputs = make_inputs(mask.grid, 2, 2, WIDTH)
    compare_forward(kernel, inputs, mask, lengths=lengths)
    for tensor in inputs[1:3]:
        tensor[0, 990 + lengths[0] :] = torch.nan
    actual = attend(kernel, inputs, mask, torch.float16, lengths)
    assert actual.isfinite().all()
    assert not any(actual[sample, 990 + length :].any() for sample, length in enumerate(lengths))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [None, 3])
def test_sparse_sageattn(monkeypatch, heads, dtype):
    """It takes no scale: that comes through the query."""
    install(monkeypatch, kernel_emulations.sparse_sageattn())
    mask = new_mask(ALIGNED, heads=heads)
    inputs = make_inputs(mask.grid, 2, 3, WIDTH)
    compare_forward(kernel, inputs, mask, dtype)
    compare_forward(kernel, inputs, mask, dtype, [0, 64])
    actual, plain = (attend(x, inputs, mask, torch.float16, scale=0.3) for x in (kernel, reference))
    assert_near(actual, plain)


def test_the_first_library_that_takes_the_mask_is_used(monkeypatch):
    spas, other = kernel_emulations.spas_sage_attn(), kernel_emulations.sparse_sageattn()
    install(monkeypatch, spas, other)
    attend(kernel, make_inputs(ALIGNED, 1, 1, WIDTH), new_mask(ALIGNED), torch.float16)
    assert len(spas.calls) == 1 and not other.calls
    small = TokenGrid(1, 8, 8)
    compare_forward(kernel, make_inputs(small, 1, 1, WIDTH), new_mask(small))
    assert len(spas.calls) == len(other.calls) == 1


EYE = torch.eye(4, dtype=torch.bool)
PAIRED = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("blocks", "shape", "rows"),
    [
        (EYE, (128, 64), None),
        (PAIRED, (128, 64), [[1, 1, 0, 0], [0, 1, 1, 1]]),
        (PAIRED, HOPPER, None),
        (PAIRED.T, HOPPER, [[1, 0], [1, 1], [0, 1], [0, 1]]),
    ],
)
def test_small_blocks_are_exact_or_refused(blocks, shape, rows):
    """Blocks of 64 and 235 tokens: the last kernel block of 128 holds a short one."""
    mask = BlockMask(TokenGrid(5, 47, 1), 64, blocks)
    actual = kernel.kernel_blocks(mask, *shape)
    assert (actual if rows is None else actual[0].int().tolist()) == rows


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("shape", [(128, 64), HOPPER])
def test_kernel_blocks_are_the_mask(shape, size, heads):
    """Kernel blocks, spread on tokens, are the mask on tokens, or there are none."""
    grid = GRIDS[1000]
    coarse = make_mask(grid, 256, heads).blocks.repeat_interleave(256 // size, -1)
    blocks = coarse.repeat_interleave(256 // size, -2)[..., : -(-1000 // size), : -(-1000 // size)]
    mask = BlockMask(grid, size, blocks)
    actual = kernel.kernel_blocks(mask, *shape)
    spread = actual.repeat_interleave(shape[0], 1).repeat_interleave(shape[1], 2)[:, :1000, :1000]
    assert torch.equal(spread.view_as(mask.token_mask()), mask.token_mask())
    changed = mask.blocks.clone()
    changed[..., 0, 1] = ~changed[..., 0, 1]
    assert (kernel.kernel_blocks(BlockMask(grid, size, changed), *shape) is None) == (size < 128)


def test_rows_without_keys_are_zeros(monkeypatch):
    grid = TokenGrid(4, 8, 8, text=128)
    blocks = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    for patterns in (blocks, torch.stack([blocks, blocks.T])):
        install(monkeypatch, kernel_emulations.spas_sage_attn())
        mask, inputs = BlockMask(grid, 128, patterns), make_inputs(grid, 1, 2, WIDTH)
        actual, plain = (attend(x, inputs, mask, torch.float16, [0]) for x in (kernel, reference))
        assert not actual[:, 128:, 0].any()
        assert_near(actual, plain)


@pytest.mark.parametrize(
    ("libraries", "grid", "size", "message"),
    [
        ((), GRIDS[1000], 128, "needs spas_sage_attn or sparse_sageattn: pip install"),
        (("spas_sage_attn",), GRIDS[111], 128, "spas_sage_attn takes 128 tokens or more, got 111"),
        (("spas_sage_attn",), GRIDS[1000], 64, "block_size=64 splits: make it with block_size=128"),
        (("sparse_sageattn",), GRIDS[1000], 128, "multiples of 64 tokens, got 1000"),
    ],
)
def test_what_cannot_be_exact_is_refused(monkeypatch, libraries, grid, size, message):
    install(monkeypatch, *(getattr(kernel_emulations, name)() for name in libraries))
    mask = new_mask(grid, block_size=size, heads=1)
    if mask.is_dense:
        mask = BlockMask(grid, size, torch.zeros_like(mask.blocks))
    assert message in kernel.choose(mask, CPU)[1]
    with pytest.raises(ImportError if message.startswith("needs") else ValueError, match=message):
        attend(kernel, make_inputs(grid, 1, 1, WIDTH), mask, torch.float16)


def test_a_text_length_that_cannot_be_exact_is_refused(monkeypatch):
    install(monkeypatch, kernel_emulations.sparse_sageattn())
    with pytest.raises(ValueError, match="multiples of 64 tokens, got 323 without padded text"):
        attend(kernel, make_inputs(ALIGNED, 1, 1, WIDTH), new_mask(ALIGNED), torch.float16, [3])


def test_what_it_needs_is_named(monkeypatch):
    install(monkeypatch)
    assert missing(kernel.NEEDS).startswith("needs spas_sage_attn or sparse_sageattn or sageattention: ")
    install(monkeypatch, kernel_emulations.sparse_sageattn())
    assert missing(kernel.NEEDS) is None
    with pytest.raises(ImportError, match="needs sageattention: pip install"):
        kernel.dense(*make_inputs(GRIDS[63], 1, 1, WIDTH)[:3])
    with pytest.raises(ValueError, match="takes a positive scale, got -1"):
        attend(kernel, make_inputs(ALIGNED, 1, 1, WIDTH), new_mask(ALIGNED), torch.float16, scale=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", GRIDS)
@pytest.mark.parametrize("version", [kernel_emulations.sageattention_1, kernel_emulations.sageattention_2])
def test_dense_masks(monkeypatch, version, tokens, dtype):
    """Version 1 fills up the last block of 64 keys, which must not show."""
    install(monkeypatch, version())
    mask = dense_mask(GRIDS[tokens])
    inputs = make_inputs(mask.grid, 2, 2, WIDTH)
    inputs[1] += 3 * torch.randn(WIDTH)  # what smoothing is for
    compare_forward(kernel, inputs, mask, dtype)
    if mask.grid.text:
        compare_forward(kernel, inputs, mask, dtype, [0, mask.grid.text])


def test_keys_that_fill_up_a_block_take_little_whatever_the_scores(monkeypatch):
    """All scores far below zero: plain zeros for keys would leave nothing of the others."""
    install(monkeypatch, kernel_emulations.sageattention_1())
    query, value = (torch.randn(1, 65, 1, WIDTH).half() for _ in range(2))
    key = (-4 * query.mean(dim=1, keepdim=True).sign() + 0.1 * torch.randn(1, 65, 1, WIDTH)).half()
    query = (query * 0.1 + 4 * query.mean(dim=1, keepdim=True).sign()).half()
    mask = dense_mask(TokenGrid(1, 5, 13))
    compare_forward(kernel, [query, key, value, value], mask)


def test_dense_of_an_older_second_version(monkeypatch):
    install(monkeypatch, kernel_emulations.sageattention_2(masks_the_tail=False))
    compare_forward(kernel, make_inputs(ALIGNED, 1, 1, WIDTH), dense_mask(ALIGNED))
    message = "takes multiples of 64 tokens, got 111: install 2.2"
    assert message in kernel.choose(dense_mask(GRIDS[111]), CPU)[1]
    with pytest.raises(ValueError, match=message):
        kernel.dense(*(x.half() for x in make_inputs(GRIDS[111], 1, 1, WIDTH)[:3]))


@pytest.mark.parametrize("name", ["spas_sage_attn", "sparse_sageattn"])
def test_dense_masks_without_the_dense_library(monkeypatch, name):
    install(monkeypatch, getattr(kernel_emulations, name)())
    compare_forward(kernel, make_inputs(ALIGNED, 1, 2, WIDTH), dense_mask(ALIGNED, 16))


@pytest.mark.parametrize("tokens", [111, 1000, 384])
def test_dense_function_and_inputs_left_alone(monkeypatch, tokens):
    install(monkeypatch, kernel_emulations.sageattention_1())
    packed = torch.randn(2, tokens, WIDTH, 2, 3).half()
    tensors = [x.transpose(2, 3) for x in packed.unbind(-1)]
    plain_tensors = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
    before = packed.clone()
    wanted = reference.attention(
        *tensors, dense_mask(TokenGrid(1, tokens, 1)), text_lengths=None, scale=WIDTH**-0.5
    )
    for inputs in (tensors, plain_tensors):
        assert_near(kernel.dense(*inputs), wanted)
    assert torch.equal(packed, before)
    assert all(torch.equal(x, y) for x, y in zip(tensors, plain_tensors, strict=True))


def test_compiled_code_goes_around_the_library(monkeypatch):
    install(monkeypatch, kernel_emulations.spas_sage_attn())
    mask, inputs = new_mask(ALIGNED), make_inputs(ALIGNED, 1, 2, WIDTH)
    compiled = torch.compile(lambda *x: attend(kernel, x, mask, torch.float16) + 1, backend="eager")
    torch.testing.assert_close(compiled(*inputs), attend(kernel, inputs, mask, torch.float16) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("library", "name"),
    [("spas_sage_attn", "block_sparse_sage2_attn_cuda"), ("sparse_sageattn", "sparse_sageattn")],
)
def test_signatures_are_those_of_the_installed_library(library, name):
    real, emulated = pytest.importorskip(library), getattr(kernel_emulations, library)()
    assert_promised(getattr(real, name), getattr(emulated, name))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [0, 64]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [new_mask, dense_mask], ids=["sparse", "dense"])
def test_on_a_gpu(make, dtype, options):
    mask = make(ALIGNED)
    if kernel.choose(mask, torch.device("cuda"))[0] is None:
        pytest.skip("no library for this mask")
    tensors = [x.to("cuda", dtype) for x in make_inputs(ALIGNED, 2, 3, WIDTH)[:3]]
    actual, wanted = (
        radial_attention(*tensors, mask, backend=name, **options) for name in ("sage", "reference")
    )
    assert output_error(actual, wanted).relative_l2 < 0.1  # 8-bit products
