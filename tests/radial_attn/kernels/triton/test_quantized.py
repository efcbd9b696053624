"""The quantised Triton kernels against the definition of their rounding, run by Triton's interpreter.

In a process of its own, as tests/radial_attn/kernels/triton/test_interpreted.py.
"""

import os
from functools import partial

import pytest
import torch

from radial_attn import TokenGrid, radial_attention
from radial_attn.analysis.sampled_error import OutputError, output_error
from radial_attn.kernels import reference
from radial_attn.kernels.quantized_reference import quantized_attention
from tests.support.attention_cases import GRIDS, make_inputs, make_mask

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by tests/radial_attn/kernels/triton/test_op.py"
)


@pytest.fixture
def right_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter loses the carry when fp8 rounds up to the next power of two: torch rounds instead."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(numbers, source, target, mode):
        if (source, target) != (tl.float32, tl.float8e4nv):
            return convert(numbers, source, target, mode)
        return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def quantized_errors(
    monkeypatch, tensors, mask, bits: str, **options
) -> tuple[torch.Tensor, OutputError, OutputError]:
    """Compares the kernel with the definition of its rounding, and that definition with the exact result.

    The kernel's result comes first.
    """
    columns = 32  # of the interpreted launch, whose int8 leaves the values in 16 bits
    as_kernel = partial(quantized_attention, columns=columns, fp8_values=bits == "fp8")
    monkeypatch.setattr(reference, "quantized_attention", as_kernel)
    exact = radial_attention(*(x.float() for x in tensors), mask, backend="reference", **options)
    defined, actual = (
        radial_attention(*tensors, mask, backend=name, quantize=bits, **options)
        for name in ("reference", "triton")
    )
    return actual, output_error(actual, defined), output_error(defined, exact)


@pytest.mark.usefixtures("right_fp8")
@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param((63, 64, torch.float32, None), marks=pytest.mark.long),
        (63, 96, torch.float16, None),
        (111, 128, torch.float32, [0, 7]),
        pytest.param((496, 64, torch.float16, None), marks=pytest.mark.long),
    ],
)
def test_quantized(monkeypatch, case, bits):
    """int8 agrees with the definition up to rounding; fp8 weights are rounded against another maximum."""
    size, width, dtype, lengths = case
    grid = GRIDS.get(size, TokenGrid(6, 9, 9, text=10))
    tensors = [x.to(dtype) for x in make_inputs(grid, 1 if lengths is None else 2, 1, width)[:3]]
    tensors[1] += 3 * torch.randn(width).to(dtype)  # channels with an offset, as keys of video models have
    _, apart, rounding = quantized_errors(
        monkeypatch, tensors, make_mask(grid, 16 if size < 496 else 64), bits, text_lengths=lengths
    )
    assert apart.relative_l2 < ((1e-6 if dtype == torch.float32 else 1e-3) if bits == "int8" else 0.04)
    assert rounding.relative_l2 < (0.015 if bits == "int8" else 0.06)


@pytest.mark.usefixtures("right_fp8")
@pytest.mark.parametrize("bits", ["int8", "fp8"])
def test_quantized_mask_per_head_and_zero_rows(monkeypatch, bits):
    grid = TokenGrid(3, 5, 5, text=5)
    tensors, mask = make_inputs(grid, 2, 3, 64)[:3], make_mask(grid, 64, heads=3)
    out, apart, _ = quantized_errors(monkeypatch, tensors, mask, bits, text_lengths=[2, 5])
    assert apart.relative_l2 < (1e-6 if bits == "int8" else 0.04)
    assert not out[0, grid.video_tokens + 2 :].any() and out[1, grid.video_tokens + 2 :].any()


@pytest.mark.usefixtures("right_fp8")
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.01), ("fp8", 0.06), (None, 1e-5)])
def test_log_sum_exp(bits, most):
    """Of the kept scores, the mean key that quantisation takes off included; -inf without keys."""
    from radial_attn.kernels.triton import op as kernel
    from radial_attn.kernels.triton.quantized import quantized_attention as quantized

    grid = GRIDS[111]
    query, key, value, _ = make_inputs(grid, 2, 1, 64)
    key += 3 * torch.randn(64)
    mask = make_mask(grid)
    counts = torch.tensor([104, 111], dtype=torch.int32)
    arguments = query, key, value, mask.blocks, 16, grid.video_tokens, counts, 0.125
    _, actual = quantized(*arguments, bits) if bits else kernel.triton_attention(*arguments)
    keep = mask.token_mask() & (torch.arange(111) < counts.view(-1, 1, 1, 1))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.125
    wanted = scores.masked_fill(~keep, -torch.inf).logsumexp(-1)
    assert (actual - wanted)[0, :, :104].abs().max() < most and (actual - wanted)[1].abs().max() < most
    assert (actual[0, :, 104:] == -torch.inf).all()
