"""Shared by the tests of the attention backends: inputs, masks, and tolerances derived from data."""

from types import ModuleType

import torch
from torch import Tensor

from radial_attn import BlockMask, RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.kernels import reference

GRIDS = {63: TokenGrid(7, 3, 3), 111: TokenGrid(4, 5, 5, text=11), 1000: TokenGrid(9, 10, 11, text=10)}


def make_mask(grid: TokenGrid, block_size: int = 16, heads: int | None = None) -> BlockMask:
    """Makes a radial mask, or a random pattern for each of `heads`, of which the first two are equal."""
    mask = radial_mask(grid, RadialConfig(block_size=block_size, decimation_width="block"))
    if heads is None:
        return mask
    count = mask.blocks.shape[-1]
    blocks = torch.rand(heads, count, count) < 0.4
    blocks |= torch.eye(count, dtype=torch.bool)
    blocks[: min(2, heads)] = blocks[0].clone()
    return BlockMask.from_blocks(grid, blocks, block_size)


def make_inputs(grid: TokenGrid, batch: int, heads: int, width: int) -> list[Tensor]:
    """Returns query, key, value and a gradient of the output, `[B, S, H, D]`."""
    return [torch.randn(batch, grid.tokens, heads, width) for _ in range(4)]


def run(backend: str, inputs: list[Tensor], mask: BlockMask, dtype: torch.dtype, **options) -> list[Tensor]:
    """Returns the output and the gradients of query, key and value."""
    query, key, value = (x.to(dtype, copy=True).requires_grad_() for x in inputs[:3])
    out = radial_attention(query, key, value, mask, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), inputs[3].to(dtype))]


def exact(inputs: list[Tensor], mask: BlockMask, dtype: torch.dtype, text_lengths=None) -> list[Tensor]:
    """Computes the same by the definition, in float64 on the inputs as `dtype` holds them."""
    keep = mask.token_mask().view(1, -1, mask.grid.tokens, mask.grid.tokens)
    query, key, value, grad = (x.to(dtype).double() for x in inputs)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    if text_lengths is not None:
        valid = torch.tensor(text_lengths).view(-1, 1, 1, 1) + mask.grid.video_tokens
        token = torch.arange(mask.grid.tokens)
        keep = keep & (token < valid) & (token.unsqueeze(1) < valid)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~keep, -1e300)
    weights = scores.softmax(-1) * keep.any(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_as_good_as(actual: list[Tensor], reference: list[Tensor], truth: list[Tensor]) -> None:
    """The largest error against float64 is at most twice that of SDPA in the same data type.

    On top of that comes what adding scores of a few units in float32, or one rounding of the result,
    may cost: 8 epsilon of float32, half an epsilon of a 16-bit type, times the largest value.
    """
    for name, got, plain, want in zip(("out", "dq", "dk", "dv"), actual, reference, truth, strict=False):
        floor = 8 if got.dtype == torch.float32 else 0.5
        floor *= torch.finfo(got.dtype).eps * want.abs().max().item()
        error, allowed = ((x.double() - want).abs().max().item() for x in (got, plain))
        assert error <= 2 * allowed + floor, (name, error, allowed, floor)


def compare(
    backend: str, inputs: list[Tensor], mask: BlockMask, dtype: torch.dtype, device: str = "cpu", **options
) -> None:
    """Compares forward and backward of a backend with `reference`, both judged by float64."""
    there = [x.to(device) for x in inputs]
    actual, plain = (
        [x.cpu() for x in run(name, there, mask, dtype, **options)] for name in (backend, "reference")
    )
    assert_as_good_as(actual, plain, exact(inputs, mask, dtype, **options))


def fresh_mask(*args, **options) -> BlockMask:
    """Makes a mask without another test's plans: radial masks of one shape are one object."""
    mask = make_mask(*args, **options)
    return BlockMask(mask.grid, mask.block_size, mask.blocks)


def attend(kernel: ModuleType, inputs, mask, dtype, lengths=None, *, scale: float = 0.125) -> Tensor:
    """Calls the module of a kernel without any validation; the default `scale` is that of heads of 64."""
    counts = None if lengths is None else torch.tensor(lengths)
    return kernel.attention(*(x.to(dtype) for x in inputs[:3]), mask, text_lengths=counts, scale=scale)


def compare_forward(kernel: ModuleType, inputs, mask, dtype=torch.float16, lengths=None) -> None:
    """Compares the output of a kernel's module with `reference`, both judged by float64."""
    actual, plain = (attend(module, inputs, mask, dtype, lengths) for module in (kernel, reference))
    assert actual.dtype == dtype
    assert_as_good_as([actual], [plain], exact(inputs, mask, dtype, lengths))


def assert_near(actual: Tensor, wanted: Tensor) -> None:
    """Allows a few roundings of float16."""
    torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=2e-3)
