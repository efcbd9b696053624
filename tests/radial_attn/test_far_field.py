"""Dropped blocks in the softmax, against the definition: outputs, gradients, refusals."""

import pytest
import torch

from radial_attn import BlockMask, TokenGrid, radial_attention
from radial_attn.far_field import Far
from tests.support.far_cases import bias_for, defined, some_mask

VIDEO, TEXT = TokenGrid(5, 6, 5), TokenGrid(5, 6, 5, 9)  # 150 tokens: the last block of 16 holds 6
CASES = [
    (VIDEO, 2, None, 16),
    (VIDEO, None, None, 16),
    (TEXT, 2, [9, 4], 16),
    (TEXT, None, [0, 4], 32),
    (TEXT, 2, None, 64),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
forms = pytest.mark.parametrize("far_field", ["mean", "linear"])
corrected = pytest.mark.parametrize("corrected", [False, True])


def tensors(grid: TokenGrid, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, grid.tokens, 2, 12, generator=generator).to(dtype) for _ in range(4)]


@cases
@forms
@corrected
@pytest.mark.parametrize("backend", ["reference", "blocks", "cpp"])
def test_output(case, far_field, corrected, backend):
    grid, heads, lengths, size = case
    mask, (*inputs, _) = some_mask(grid, size, heads), tensors(grid)
    bias = bias_for(mask) if corrected else None
    options = {"text_lengths": lengths, "scale": 0.3, "far_field": far_field, "far_bias": bias}
    out = radial_attention(*inputs, mask, backend=backend, **options)
    wanted = defined(inputs, mask, far_field, bias=bias, lengths=lengths, scale=0.3)
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=0)
    plain = radial_attention(*inputs, mask, backend=backend, text_lengths=lengths, scale=0.3)
    assert (plain - out).abs().max() > 0.01


@cases
@forms
@corrected
@pytest.mark.parametrize("backend", ["blocks", "cpp"])
def test_gradients(case, far_field, corrected, backend):
    grid, heads, lengths, size = case
    mask, (*inputs, grad) = some_mask(grid, size, heads), tensors(grid)
    inputs = [x.requires_grad_() for x in inputs]
    bias = bias_for(mask) if corrected else None
    options = {"text_lengths": lengths, "scale": 0.3, "far_field": far_field, "far_bias": bias}
    out = radial_attention(*inputs, mask, backend=backend, **options)
    wanted = defined(inputs, mask, far_field, bias=bias, lengths=lengths, scale=0.3)
    exact = torch.autograd.grad(wanted, inputs, grad.double())
    for actual, expected in zip(torch.autograd.grad(out, inputs, grad), exact, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


@forms
@pytest.mark.parametrize("backend", ["blocks", "cpp"])
def test_bfloat16(backend, far_field, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # with AMX `cpp` would refuse
    mask, (*inputs, _) = some_mask(TEXT, 16, 2), tensors(TEXT, torch.bfloat16)
    out = radial_attention(*inputs, mask, backend=backend, far_field=far_field)
    wanted = defined(inputs, mask, far_field, scale=12**-0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, atol=0.02, rtol=0.02)


def test_blocks_of_equal_tokens_are_exact():
    """Keys that do not differ within a block are their mean, so nothing is lost at any density."""
    grid = TokenGrid(4, 4, 8)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 128, 2, 8, generator=generator) for _ in range(3))
    key, value = (x[:, ::16].repeat_interleave(16, 1) for x in (key, value))
    dense = BlockMask.from_blocks(grid, torch.ones(8, 8, dtype=torch.bool))
    for backend in ("blocks", "cpp"):
        out = radial_attention(query, key, value, some_mask(grid, 16), backend=backend, far_field="mean")
        torch.testing.assert_close(out, radial_attention(query, key, value, dense), atol=5e-6, rtol=0)


def test_few_rows_at_a_time(monkeypatch):
    mask, (*inputs, grad) = some_mask(TEXT, 16, 2), tensors(TEXT)
    inputs = [x.requires_grad_() for x in inputs]

    def run():
        out = radial_attention(*inputs, mask, backend="blocks", far_field="linear")
        return [out, *torch.autograd.grad(out, inputs, grad)]

    whole = run()
    monkeypatch.setattr("radial_attn.far_field.CHUNK", 2000)
    for x, y in zip(run(), whole, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


@forms
@pytest.mark.parametrize("backend", ["blocks", "cpp"])
def test_compiled_code_goes_around_it(backend, far_field):
    mask, (*inputs, grad) = some_mask(TEXT, 16, 2), tensors(TEXT)
    inputs = [x.requires_grad_() for x in inputs]

    def run(query, key, value):
        options = {"backend": backend, "far_field": far_field, "text_lengths": [9, 4]}
        return radial_attention(2 * query, key, value, mask, **options).sin()

    plain, compiled = run(*inputs), torch.compile(run, backend="aot_eager")(*inputs)
    results = [[out, *torch.autograd.grad(out, inputs, grad)] for out in (plain, compiled)]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 10), (2, 1, 1, 10), (1, 2, 10, 10), (1, 1, 10, 1)])
def test_a_bias_for_all_samples_heads_or_rows(shape):
    mask, (*inputs, _) = some_mask(VIDEO, 16), tensors(VIDEO)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    wanted = defined(inputs, mask, "mean", bias=bias.expand(2, 2, 10, 10), scale=0.3)
    for backend in ("blocks", "cpp"):
        options = {"backend": backend, "far_field": "mean", "far_bias": bias, "scale": 0.3}
        out = radial_attention(*inputs, mask, **options)
        torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=0)


@forms
def test_a_dense_mask_has_no_far_field(far_field):
    mask = BlockMask.from_blocks(VIDEO, torch.ones(10, 10, dtype=torch.bool), 16)
    inputs = tensors(VIDEO)[:3]
    assert torch.equal(radial_attention(*inputs, mask, far_field=far_field), radial_attention(*inputs, mask))


def test_scores_of_any_size():
    mask, (query, key, value, _) = some_mask(VIDEO, 16, 2), tensors(VIDEO)
    wanted = defined([100 * query, 100 * key, value], mask, "mean", scale=0.3)
    for backend in ("blocks", "cpp"):
        out = radial_attention(
            100 * query, 100 * key, value, mask, backend=backend, far_field="mean", scale=0.3
        )
        torch.testing.assert_close(out.double(), wanted, atol=2e-3, rtol=0)


def test_the_slope_is_zero_for_equal_values():
    _, key, _, _ = tensors(VIDEO)
    far = Far.of(key, torch.ones_like(key), some_mask(VIDEO, 16), "linear")
    assert far.slope.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"far_field": "means"}, "far_field must be one of .*'means'; did you mean 'mean'"),
        (
            {"far_field": "mean", "backend": "flex"},
            "backend 'flex' has no far_field='mean', as it gives no log-sum-exp",
        ),
        (
            {"far_field": "mean", "backend": "reference", "quantize": "int8"},
            "has no far_field='mean' with quantize='int8'",
        ),
        (
            {"far_field": "mean", "far_bias": torch.zeros(1, 3, 1, 10)},
            r"far_bias must be \[2, 2, 10, 10\], each of them or 1, got \[1, 3, 1, 10\]",
        ),
        ({"far_field": "mean", "far_bias": torch.zeros(10, 10)}, r"far_bias must be .* got \[10, 10\]"),
        ({"far_bias": torch.zeros(1, 1, 1, 10)}, "far_bias needs a far field: set far_field to 'mean'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        radial_attention(*tensors(VIDEO)[:3], some_mask(VIDEO, 16), **options)


def test_no_gradients_through_the_reference():
    inputs = [x.requires_grad_() for x in tensors(VIDEO)[:3]]
    with pytest.raises(ValueError, match="has no gradients with far_field='linear' on cpu"):
        radial_attention(*inputs, some_mask(VIDEO, 16), far_field="linear", backend="reference")
