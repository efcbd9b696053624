"""The flash4 backend against an emulation of the package, and against the package itself on a GPU."""

import re
from dataclasses import replace

import pytest
import torch

from radial_attn import BlockMask, TokenGrid
from radial_attn.block_mask import Part
from radial_attn.dispatch import obstacle, unsuited
from radial_attn.far_field import far_attention
from radial_attn.kernels import reference
from radial_attn.kernels.blocks import op as blocks
from radial_attn.kernels.contract import Call
from radial_attn.kernels.flash4 import library, lists
from radial_attn.kernels.flash4 import op as kernel
from tests.support import flash4_emulation
from tests.support.attention_cases import (
    GRIDS,
    assert_as_good_as,
    assert_near,
    attend,
    compare,
    compare_forward,
    exact,
    fresh_mask,
    make_inputs,
)
from tests.support.far_cases import some_mask
from tests.support.partial_cases import make, some_blocks

WIDTH = 64
HOPPER = Call(torch.device("cuda"), torch.float16, 64, gradients=False)


@pytest.fixture
def package(monkeypatch):
    """Installs the emulation; yields the calls of its two functions."""
    interface, calls = flash4_emulation.install(monkeypatch), []
    monkeypatch.setattr(library, "problem", lambda: None)
    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        setattr(interface, name, noted(calls, name, getattr(interface, name)))
    library.table_lookup.cache_clear()
    yield calls
    library.table_lookup.cache_clear()


def noted(calls, name, function):
    def call(*args, **options):
        calls.append((name, options))
        return function(*args, **options)

    return call


def random_mask(grid, block_size, heads=None):
    """Keeps the diagonal and a random third; the last block is left out by the first."""
    count = grid.num_blocks(block_size)
    blocks = torch.rand(heads or 1, count, count) < 0.3
    blocks |= torch.eye(count, dtype=torch.bool)
    if count > 1:
        blocks[:, 0, -1] = False
    return BlockMask(grid, block_size, blocks if heads else blocks[0])


def with_gradients(module, inputs, mask, lengths=None):
    """Returns the output and the gradients of query, key and value."""
    leaves = [x.half().requires_grad_() for x in inputs[:3]]
    counts = None if lengths is None else torch.tensor(lengths)
    out = module.attention(*leaves, mask, text_lengths=counts, scale=WIDTH**-0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].half())]


def compare_gradients(inputs, mask, lengths=None):
    actual, plain = (with_gradients(module, inputs, mask, lengths) for module in (kernel, reference))
    assert_as_good_as(actual, plain, exact(inputs, mask, torch.float16, text_lengths=lengths))


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("tokens", [111, 300, 390])
def test_odd_sizes(package, tokens, block_size, heads):
    mask = random_mask(TokenGrid(1, tokens // 3, 3), block_size, heads)
    compare_gradients(make_inputs(mask.grid, 2, 2, WIDTH), mask)
    sparse = [options.get("block_sparse_tensors") for _, options in package]
    assert len(sparse) == 2 and all((x is None) == mask.is_dense for x in sparse)
    if not mask.is_dense:
        mixed = [int(x.mask_block_cnt.sum()) for x in sparse]
        assert mixed[0] == 0 and (mixed[1] > 0) == (block_size == 64)


def test_wide_heads_in_bfloat16(package):
    mask = random_mask(TokenGrid(1, 100, 3), 64)
    compare_forward(kernel, make_inputs(mask.grid, 1, 2, 128), mask, torch.bfloat16)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("lengths", [[0, 0], [70, 150]], ids=str)
def test_padded_text(package, lengths, block_size, heads):
    """Lists are cut where the valid text ends; what is padded is not read, and gets zeros."""
    grid = TokenGrid(4, 5, 9, text=150)
    mask = random_mask(grid, block_size, heads)
    inputs = make_inputs(grid, 2, 2, WIDTH)
    compare_gradients(inputs, mask, lengths)
    for sample, length in enumerate(lengths):
        for tensor in inputs:
            tensor[sample, 180 + length :] = torch.nan
    for result in with_gradients(kernel, inputs, mask, lengths):
        assert result.isfinite().all()
        for sample, length in enumerate(lengths):
            assert not result[sample, 180 + length :].any()
    assert len(package) == 4 * len(set(lengths))


@pytest.mark.parametrize("heads", [None, 2])
def test_rows_and_columns_without_partners(package, heads):
    """A row may keep nothing at all, or nothing but text that is padded; no row may keep a key block."""
    grid = TokenGrid(4, 10, 10, text=100)
    blocks = torch.eye(8, dtype=torch.bool).expand(2, 8, 8).clone()
    blocks[:, 1] = False
    blocks[:, 2] = torch.arange(8) == 7
    blocks[:, 0, 0], blocks[:, 0, 1] = False, True
    mask = BlockMask(grid, 64, blocks if heads else blocks[0])
    compare_gradients(make_inputs(grid, 1, 2, WIDTH), mask, [20])
    actual = attend(kernel, make_inputs(grid, 1, 2, WIDTH), mask, torch.float16, [20])
    assert not actual[:, 64:192].any() and actual[:, :64].all()


def test_a_dense_mask_has_no_lists(package):
    grid = TokenGrid(4, 8, 9, text=10)
    mask = BlockMask.from_blocks(grid, torch.ones(19, 19, dtype=torch.bool), 16)
    compare_gradients(make_inputs(grid, 1, 2, WIDTH), mask, [3])
    assert [options.get("block_sparse_tensors") for _, options in package] == [None] * 2


@pytest.mark.parametrize("lengths", [None, [30, 100]], ids=str)
def test_full_rows_are_computed_apart_if_lists_are_large(package, lengths, monkeypatch):
    monkeypatch.setattr(lists, "MOST_BYTES", 0)
    mask = some_mask(TokenGrid(4, 8, 9, text=100), 64, heads=2)
    compare_forward(kernel, make_inputs(mask.grid, 2, 2, WIDTH), mask, lengths=lengths)
    sparse = [options.get("block_sparse_tensors") for _, options in package]
    assert [x is None for x in sparse] == [False, True] * len(lengths or [0])
    assert all(x.full_block_idx.shape[3] < 7 for x in sparse if x is not None)


@pytest.mark.parametrize(("row_text", "key_text"), [(70, 70), (0, 70), (70, 0)])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("sizes", [(300, 200), (100, 400)], ids=str)
def test_part_of_the_keys(package, sizes, heads, row_text, key_text):
    part = Part(some_blocks(*sizes, heads, size=64), 64, row_text, key_text)
    tensors = [x.half() for x in make(*sizes, width=64)]
    for lengths in (None, torch.tensor([0, 40])):
        actual, wanted = (
            module.partial_attention(*tensors, part, text_lengths=lengths, scale=0.1)
            for module in (kernel, reference)
        )
        assert_near(actual[0], wanted[0])
        torch.testing.assert_close(actual[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [None, [4, 40]], ids=str)
def test_far_field(package, lengths):
    """Merged by the log-sum-exp; gradients of kept blocks with the output and log-sum-exp of all."""
    mask = some_mask(TokenGrid(4, 8, 9, text=40), 64, heads=2)
    *inputs, grad = (x.half() for x in make_inputs(mask.grid, 2, 2, WIDTH))
    counts = None if lengths is None else torch.tensor(lengths)
    results = []
    for module in (kernel, blocks):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = far_attention(module, leaves, mask, ("linear", None), text_lengths=counts, scale=0.125)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=2e-3)


def test_lists_are_made_once(package, monkeypatch):
    made = []
    build = lists._make
    monkeypatch.setattr(lists, "_make", lambda *args: made.append(args) or build(*args))
    mask = random_mask(TokenGrid(4, 5, 9, text=150), 64)
    inputs = make_inputs(mask.grid, 2, 2, WIDTH)
    for lengths in ([0, 150], [100, 150], [0, 150]):
        with_gradients(kernel, inputs, mask, lengths)
    assert len(made) == 2


@pytest.mark.parametrize("lengths", [None, [4, 10]], ids=str)
def test_operators(package, lengths):
    mask = random_mask(TokenGrid(4, 8, 9, text=10), 64)
    tensors = [x.half().requires_grad_() for x in make_inputs(mask.grid, 2, 2, WIDTH)[:3]]
    counts = None if lengths is None else torch.tensor(lengths)
    torch.library.opcheck(kernel.flash4_attention, (*tensors, mask.blocks, 64, 288, counts, 0.125))


def test_compiled_code_holds_the_operator(package):
    mask = random_mask(TokenGrid(4, 8, 9, text=10), 128)
    inputs = make_inputs(mask.grid, 1, 2, WIDTH)
    compiled = torch.compile(
        lambda *x: attend(kernel, x, mask, torch.float16, [7]) + 1, backend="eager", fullgraph=True
    )
    assert_near(compiled(*inputs), attend(kernel, inputs, mask, torch.float16, [7]) + 1)


def test_strided_inputs_and_inputs_left_alone(package):
    mask = fresh_mask(GRIDS[111], 64)
    packed = torch.randn(2, 111, WIDTH, 2, 3).half()
    tensors, before = [x.transpose(2, 3) for x in packed.unbind(-1)], packed.clone()
    actual, plain = (x.attention(*tensors, mask, text_lengths=None, scale=0.125) for x in (kernel, reference))
    assert_near(actual, plain)
    assert torch.equal(packed, before)


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({}, (9, 0), None),
        ({"gradients": True, "far_field": "mean"}, (9, 0), None),
        ({"partial": True}, (9, 0), None),
        ({}, (8, 0), "has kernels for compute capability 9.0 and 10.0, got 8.0"),
        ({}, (8, 9), "has kernels for compute capability 9.0 and 10.0, got 8.9"),
        ({}, (12, 0), "has kernels for compute capability 9.0 and 10.0, got 12.0"),
        (
            {"size": 32},
            (9, 0),
            "takes masks with block_size 64 or 128 or 256 on compute capability 9.0, got 32",
        ),
        ({"size": 128}, (10, 0), "takes masks with block_size 256 on compute capability 10.0, got 128"),
        ({"size": 256}, (10, 0), None),
        ({"width": 96}, (9, 0), "takes head widths (64, 128), got 96"),
        ({"dtype": torch.float32}, (9, 0), "takes float16 and bfloat16, got torch.float32"),
        ({"quantize": "int8"}, (9, 0), "has no quantize='int8'"),
        ({"device": torch.device("cpu")}, (9, 0), "runs on cuda, got a tensor on cpu"),
    ],
)
def test_what_it_does_not_serve_is_named(package, change, capability, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    changed = dict(change)
    mask = random_mask(TokenGrid(5, 10, 10), changed.pop("size", 256))
    assert unsuited(kernel.NEEDS, replace(HOPPER, mask=mask, **changed)) == message


def test_deterministic_gradients_are_refused(package, poison):
    call = replace(HOPPER, gradients=True)
    assert unsuited(kernel.NEEDS, call) == "has no deterministic gradients"
    assert unsuited(kernel.NEEDS, HOPPER) is None


@pytest.mark.parametrize(
    ("versions", "environment", "message"),
    [
        ({}, {}, "needs flash-attn-4: pip install flash-attn-4=="),
        (
            {"flash-attn-4": "4.0.0b20"},
            {},
            "needs flash-attn-4 4.0.0b36, whose functions it calls, got 4.0.0b20",
        ),
        ({"nvidia-cutlass-dsl": "4.6.1"}, {}, "needs nvidia-cutlass-dsl 4.7 or later, .* got 4.6.1"),
        ({"nvidia-cutlass-dsl": "4.10.0"}, {}, None),
        (
            {"nvidia-cutlass-dsl": "4.7.0"},
            {"FLASH_ATTENTION_ARCH": "80"},
            ".*FLASH_ATTENTION_ARCH=80: unset it",
        ),
    ],
)
def test_the_package_must_be_the_one_that_was_read(versions, environment, message, monkeypatch):
    """FLASH_ATTENTION_ARCH=80 would make it silently ignore the lists."""
    installed = versions and {"flash-attn-4": library.VERSION, **versions}
    monkeypatch.setattr(library, "_version", installed.get)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    reason = library.problem.__wrapped__()
    assert reason is None if message is None else re.match(message, reason)


def test_the_operator_refuses_too(package):
    """In a compiled graph nothing else asks."""
    inputs, mask = make_inputs(GRIDS[111], 1, 2, WIDTH), fresh_mask(GRIDS[111], 16)
    with pytest.raises(ValueError, match="backend 'flash4' takes masks with block_size 64 or 128 or 256"):
        attend(kernel, inputs, mask, torch.float16)
    with pytest.raises(ValueError, match="takes a positive scale, got 0"):
        attend(kernel, inputs, mask, torch.float16, scale=0.0)


def test_without_a_library_nothing_runs(monkeypatch):
    monkeypatch.setattr(library, "problem", lambda: "needs flash-attn-4: pip")
    inputs, mask = make_inputs(GRIDS[111], 1, 2, WIDTH), fresh_mask(GRIDS[111], 64)
    with pytest.raises(ImportError, match="backend 'flash4' needs flash-attn-4: pip"):
        attend(kernel, inputs, mask, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [4, 150]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_on_a_gpu(block_size, width, heads, dtype, options):
    mask = random_mask(TokenGrid(5, 10, 10, text=150), block_size, heads)
    if reason := obstacle("flash4", Call(torch.device("cuda"), dtype, width, True, mask)):
        pytest.skip(reason)
    compare("flash4", make_inputs(mask.grid, 2, 3, width), mask, dtype, device="cuda", **options)
