"""The flex backend against the definition. Compiling takes seconds: few shapes, all on the CPU."""

import pytest
import torch

from radial_attn import RadialConfig, TokenGrid, radial_attention, radial_mask
from radial_attn.kernels import flex as kernel
from radial_attn.kernels.compiler import compiler_problem
from tests.support.attention_cases import GRIDS, assert_as_good_as, compare, exact, make_inputs, make_mask

PROBLEM = compiler_problem("cpu")
needs_compiler = pytest.mark.skipif(PROBLEM is not None, reason=f"FlexAttention needs {PROBLEM}")


def attend(backend, inputs, mask, dtype, **options) -> torch.Tensor:
    query, key, value = (x.to(dtype) for x in inputs[:3])
    return radial_attention(query, key, value, mask, backend=backend, **options)


def check(inputs, mask, dtype, **options) -> None:
    actual, plain = (attend(backend, inputs, mask, dtype, **options) for backend in ("flex", "reference"))
    assert_as_good_as([actual], [plain], exact(inputs, mask, dtype, **options))


@needs_compiler
def test_text_padding_small_blocks_narrow_heads_and_no_second_compile():
    grid = GRIDS[111]
    inputs, mask = make_inputs(grid, 2, 3, 10), make_mask(grid)
    torch._dynamo.utils.counters.clear()
    for lengths in ([0, 11], [4, 7]):
        check(inputs, mask, torch.float32, text_lengths=lengths)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
@pytest.mark.parametrize(("tokens", "width"), [(63, 12), (1000, 96), (111, 128)])
def test_odd_sizes(tokens, width):
    grid = GRIDS[tokens]
    check(make_inputs(grid, 1, 2, width), make_mask(grid), torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(dtype):
    grid = GRIDS[63]
    check(make_inputs(grid, 1, 2, 64), make_mask(grid), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"text_lengths": [4, 11]}], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [12, 64, 128])
def test_forward_and_backward_on_a_gpu(width, dtype, options):
    grid = GRIDS[111]
    inputs = make_inputs(grid, 2, 3, width)
    compare("flex", inputs, make_mask(grid), dtype, device="cuda", **options)


@needs_compiler
def test_mask_per_head_and_short_last_block():
    grid = TokenGrid(5, 10, 10, text=11)
    check(make_inputs(grid, 1, 3, 64), make_mask(grid, 128, heads=3), torch.bfloat16)


@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("text", [0, 11])
def test_block_mask_and_mask_mod_agree_with_the_mask(block_size, heads, text):
    """What FlexAttention computes from the indices, cut by the mask_mod, is the mask."""
    grid = TokenGrid(9, 10, 11, text)
    mask = make_mask(grid, block_size, heads)
    valid = torch.tensor([990, 995]) if text else None
    flex_mask = kernel._block_mask(mask, torch.device("cpu"), valid)
    size, length = max(block_size, 128), grid.tokens
    token = torch.arange(length)
    sample, head = torch.arange(2).view(-1, 1, 1, 1), torch.arange(heads or 1).view(-1, 1, 1)
    by_mod = flex_mask.mask_mod(sample, head, token.view(-1, 1), token)
    wanted = mask.token_mask().view(1, -1, length, length)
    if text:
        wanted = wanted & (token < valid.view(-1, 1, 1, 1))
    assert torch.equal(by_mod.expand(wanted.shape), wanted)

    def expand(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        count = indices.shape[-1]
        listed = torch.where(torch.arange(count) < counts.unsqueeze(-1), indices.long(), count)
        kept = torch.zeros(*indices.shape[:-1], count + 1, dtype=torch.bool).scatter(-1, listed, True)
        return (
            kept[..., :count].repeat_interleave(size, -1).repeat_interleave(size, -2)[..., :length, :length]
        )

    partial = expand(flex_mask.kv_num_blocks, flex_mask.kv_indices)
    full = expand(flex_mask.full_kv_num_blocks, flex_mask.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal((partial & by_mod) | full, wanted)
    for name, kept in (("q", partial), ("full_q", full)):
        by_key = expand(getattr(flex_mask, f"{name}_num_blocks"), getattr(flex_mask, f"{name}_indices"))
        assert torch.equal(by_key.mT, kept)


def test_block_mask_is_made_once_and_keeps_padding_apart():
    """Tables and their transposes belong to the mask; text lengths of one call do not leak into another."""
    mask, device = make_mask(GRIDS[111]), torch.device("cpu")
    first, second = (kernel._block_mask(mask, device, torch.tensor(valid)) for valid in ([100], [105]))
    plain = [kernel._block_mask(mask, device, None) for _ in range(2)]
    assert first.q_indices is second.q_indices and first.kv_indices is second.kv_indices
    assert plain[0].q_indices is plain[1].q_indices and plain[0].mask_mod is plain[1].mask_mod
    sample, key = torch.tensor(0), torch.tensor(102)
    kept = [bool(x.mask_mod(sample, sample, key, key)) for x in (first, second, plain[0])]
    assert kept == [False, True, True]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_missing_compiler_is_named(monkeypatch, device_type):
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ImportError, match=r"(apt|pip) install .*or use backend='blocks'"):
        kernel._check_compiler(device_type)


def test_dense_pattern_needs_no_mask_mod():
    mask = radial_mask(TokenGrid(4, 16, 16), RadialConfig(pattern="dense"))
    flex_mask = kernel._block_mask(mask, torch.device("cpu"), None)
    assert flex_mask.full_kv_num_blocks.tolist() == [[[8] * 8]]
    assert not flex_mask.kv_num_blocks.any()
