"""The flashinfer backend against an emulation of the library, and against the library itself on a GPU."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.dispatch import missing, unsuited
from radial_attn.kernels import flashinfer as kernel
from radial_attn.kernels import reference
from radial_attn.kernels.contract import Call
from tests.support import kernel_emulations
from tests.support.attention_cases import (
    GRIDS,
    assert_as_good_as,
    assert_near,
    attend,
    compare_forward,
    exact,
    fresh_mask,
    make_inputs,
)
from tests.support.kernel_emulations import assert_promised

WIDTH = 64


@pytest.fixture
def library(monkeypatch):
    made = kernel_emulations.flashinfer()
    kernel_emulations.install(monkeypatch, made)
    kernel.workspace.cache_clear()
    yield made
    kernel.workspace.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("tokens", GRIDS)
def test_odd_sizes(library, tokens, block_size, heads, dtype):
    mask = fresh_mask(GRIDS[tokens], block_size, heads)
    compare_forward(kernel, make_inputs(mask.grid, 2, 3, WIDTH), mask, dtype)
    plan = library.plans[0]
    assert plan["q_data_type"] == plan["kv_data_type"] == dtype
    if heads is None:
        assert (plan["o_data_type"], plan["M"], plan["N"], plan["R"]) == (dtype, tokens, tokens, block_size)
    assert len(library.plans) == 1


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("lengths", [[0, 11], [4, 7]])
def test_padded_text(library, lengths, heads):
    mask = fresh_mask(GRIDS[111], heads=heads)
    inputs = make_inputs(mask.grid, 2, 2, WIDTH)
    for tensor in inputs[1:3]:
        tensor[0, 100 + lengths[0] :] = torch.nan
    compare_forward(kernel, [x.nan_to_num() for x in inputs], mask, lengths=lengths)
    actual = attend(kernel, inputs, mask, torch.float16, lengths)
    for sample, length in enumerate(lengths):
        assert not actual[sample, 100 + length :].any()
    assert actual.isfinite().all()
    assert len(library.plans) == 2


def test_one_plan_for_each_shape_and_one_workspace(library):
    mask, inputs = fresh_mask(GRIDS[63]), make_inputs(GRIDS[63], 2, 2, WIDTH)
    for _ in range(3):
        attend(kernel, inputs, mask, torch.float16)
    assert len(library.plans) == 1
    attend(kernel, inputs, mask, torch.bfloat16)
    attend(kernel, inputs, mask, torch.float16, scale=0.5)
    attend(kernel, [x[:, :, :1] for x in inputs], mask, torch.float16)
    attend(kernel, inputs, fresh_mask(GRIDS[63]), torch.float16)
    assert len(library.plans) == 5
    assert len({x.data_ptr() for x in library.workspaces}) == 1
    assert library.workspaces[0].numel() == 128 * 2**20


def test_the_scale_is_planned(library):
    mask, inputs = fresh_mask(GRIDS[63]), make_inputs(GRIDS[63], 1, 2, WIDTH)
    actual, plain = (attend(x, inputs, mask, torch.float16, scale=0.3) for x in (kernel, reference))
    assert library.plans[0]["sm_scale"] == 0.3
    assert_near(actual, plain)
    with pytest.raises(ValueError, match="takes a positive scale, got 0"):
        attend(kernel, inputs, mask, torch.float16, scale=0.0)


def test_dense_mask_strided_inputs_and_inputs_left_alone(library):
    grid = GRIDS[111]
    count = grid.num_blocks(32)
    mask = BlockMask.from_blocks(grid, torch.ones(count, count, dtype=torch.bool), 32)
    packed = torch.randn(2, grid.tokens, WIDTH, 2, 3).half()
    tensors = [x.transpose(2, 3) for x in packed.unbind(-1)]
    before = packed.clone()
    actual, plain = (x.attention(*tensors, mask, text_lengths=None, scale=0.125) for x in (kernel, reference))
    assert_near(actual, plain)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("heads", [None, 2])
def test_rows_without_keys_are_zeros(library, heads):
    """A row may keep nothing at all, or nothing but text that is padded."""
    grid = TokenGrid(4, 5, 5, text=12)
    blocks = torch.eye(7, dtype=torch.bool).expand(2, 7, 7).clone()
    blocks[:, 1] = False
    blocks[:, 2] = torch.arange(7) == 6
    mask = BlockMask(grid, 16, blocks if heads else blocks[0])
    inputs = make_inputs(grid, 1, 2, WIDTH)
    actual = attend(kernel, inputs, mask, torch.float16, [0])
    assert not actual[:, 16:32].any() and actual[:, 96:100].all()
    assert actual[:, 32:48].all()
    assert_near(actual, attend(reference, inputs, mask, torch.float16, [0]))


@pytest.mark.parametrize(
    ("size", "tokens", "columns"), [(16, 96, 16), (16, 100, 4), (128, 1000, 8), (64, 63, 1)]
)
def test_column_lists_are_the_mask(size, tokens, columns):
    """Cut columns, spread on tokens, are the mask on tokens."""
    grid = TokenGrid(1, 1, tokens)
    mask = fresh_mask(grid, size, heads=1)
    blocks = mask.blocks[0]
    indptr, indices = kernel.column_lists(blocks, size // columns, tokens // columns, "cpu")
    table = torch.zeros(len(blocks), tokens // columns, dtype=torch.bool)
    for row, (start, stop) in enumerate(pairwise(indptr)):
        assert (indices[start:stop].diff() > 0).all()
        table[row, indices[start:stop].long()] = True
    assert indptr.dtype == indices.dtype == torch.int32
    actual = table.repeat_interleave(mask.block_tokens, 0).repeat_interleave(columns, 1)
    assert torch.equal(actual, mask.token_mask()[0])


def test_compiled_code_goes_around_the_library(library):
    mask, inputs = fresh_mask(GRIDS[63]), make_inputs(GRIDS[63], 1, 2, WIDTH)
    compiled = torch.compile(lambda *x: attend(kernel, x, mask, torch.float16) + 1, backend="eager")
    assert_near(compiled(*inputs), attend(kernel, inputs, mask, torch.float16) + 1)


def test_what_it_needs_is_named(monkeypatch):
    kernel_emulations.install(monkeypatch)
    assert missing(kernel.NEEDS) == "needs flashinfer: pip install flashinfer-python"
    call = Call(torch.device("cpu"), torch.float16, 64, gradients=True)
    assert unsuited(replace(kernel.NEEDS, devices=None), call) == "has no gradients on cpu"


@pytest.mark.gpu
def test_signatures_are_those_of_the_installed_library():
    real, emulated = pytest.importorskip("flashinfer"), kernel_emulations.flashinfer()
    for name in ("BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper"):
        for method in ("__init__", "plan", "run"):
            assert_promised(*(getattr(getattr(module, name), method) for module in (real, emulated)))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [4, 11]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("block_size", [16, 128])
def test_on_a_gpu(block_size, heads, dtype, options):
    pytest.importorskip("flashinfer")
    mask = fresh_mask(GRIDS[111], block_size, heads)
    inputs = make_inputs(mask.grid, 2, 3, WIDTH)
    with torch.no_grad():
        tensors = [x.to("cuda", dtype) for x in inputs[:3]]
        actual, plain = (
            radial_attention(*tensors, mask, backend=name, **options).cpu()
            for name in ("flashinfer", "reference")
        )
    assert_as_good_as([actual], [plain], exact(inputs, mask, dtype, **options))
