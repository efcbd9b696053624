"""Modes of torch that change what it makes: autocast, inference mode, a default device."""

import pytest
import torch

from radial_attn import BlockMask, RadialConfig, radial_attention, radial_mask
from tests.support.attention_cases import GRIDS, make_inputs, make_mask, run

GRID = GRIDS[111]
backends = pytest.mark.parametrize("backend", ["reference", "blocks"])


def fresh_mask(pattern: str = "radial") -> BlockMask:
    """Builds a mask past the cache, so that no other test has used it."""
    config = RadialConfig(block_size=16, decimation_width="block", pattern=pattern)
    return radial_mask.__wrapped__(GRID, config)


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@backends
def test_autocast_takes_mixed_types_as_sdpa_does(backend):
    """On CUDA, autocast leaves normed queries and keys in float32 and values in 16 bits."""
    mask, tensors = make_mask(GRID), make_inputs(GRID, 2, 3, 16)[:3]
    expected = radial_attention(*(x.bfloat16() for x in tensors), mask, backend=backend)
    mixed = [*tensors[:2], tensors[2].bfloat16()]
    with autocast():
        for inputs in (mixed, tensors):
            out = radial_attention(*inputs, mask, backend=backend)
            assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        with autocast(enabled=False):
            assert radial_attention(*tensors, mask, backend=backend).dtype == torch.float32
            with pytest.raises(ValueError, match="value must have query's dtype"):
                radial_attention(*mixed, mask, backend=backend)


@backends
def test_autocast_gradients_have_the_type_of_the_inputs(backend):
    mask, inputs = make_mask(GRID), make_inputs(GRID, 1, 2, 16)
    expected = run(backend, inputs, mask, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    with autocast():
        out = radial_attention(*leaves, mask, backend=backend)
    actual = torch.autograd.grad(out, leaves, inputs[3].bfloat16())
    assert all(x.dtype == torch.float32 for x in actual)
    assert all(torch.equal(x, y.float()) for x, y in zip([out, *actual], expected, strict=True))


def test_autocast_compiles():
    mask, (query, key, value, _) = make_mask(GRID), make_inputs(GRID, 1, 2, 16)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return radial_attention(query, key, value, mask, backend="blocks")

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(query), attend(query))
    with autocast():
        assert torch.equal(compiled(query), attend(query))


@backends
def test_masks_made_under_inference_mode_train(backend):
    """Includes a call under inference mode, which leaves plans and copies on the mask."""
    inputs = make_inputs(GRID, 1, 2, 16)
    expected = run(backend, inputs, fresh_mask(), torch.float32)
    with torch.inference_mode():
        made = fresh_mask()
        copies = BlockMask.from_blocks(GRID, made.blocks), BlockMask(GRID, 16, made.blocks | False)
        masks = made, *copies
        for mask in masks:
            radial_attention(*inputs[:3], mask, backend=backend)
            _ = mask.indices, mask.block_tokens, mask.density
    for mask in masks:
        held = [mask.blocks, mask.indptr, mask.indices, mask.block_tokens]
        assert not any(x.is_inference() for x in held)
        assert all(map(torch.equal, run(backend, inputs, mask, torch.float32), expected))


def test_cached_values_are_no_inference_tensors():
    mask = fresh_mask()
    with torch.inference_mode():
        kept = mask.cached("twice", lambda: torch.arange(3.0) * 2)
        assert torch.is_inference_mode_enabled()
    weight = torch.ones(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad((weight * kept).sum(), weight)[0], kept)


@pytest.mark.parametrize("pattern", ["radial", "dense"])
def test_masks_ignore_the_default_device(pattern):
    expected = fresh_mask(pattern)
    with torch.device("meta"):
        made = fresh_mask(pattern)
        for mask in (made, BlockMask.from_blocks(made.grid, made.blocks, 16)):
            assert torch.equal(mask.blocks, expected.blocks)
            assert torch.equal(mask.block_tokens, expected.block_tokens)
            assert all(map(torch.equal, mask.csr("cpu"), expected.csr("cpu")))
            assert torch.equal(mask.token_mask(), expected.token_mask())
            assert (mask.density, mask.is_dense) == (expected.density, expected.is_dense)
        assert torch.equal(BlockMask.from_blocks(made.grid, made.blocks.tolist(), 16).blocks, made.blocks)


@backends
def test_attention_ignores_the_default_device(backend):
    inputs, lengths = make_inputs(GRID, 2, 2, 16)[:3], [4, 11]
    expected = radial_attention(*inputs, fresh_mask(), backend=backend, text_lengths=lengths)
    with torch.device("meta"):
        out = radial_attention(*inputs, fresh_mask(), backend=backend, text_lengths=lengths)
    assert torch.equal(out, expected)
