"""Branches for tensors on a GPU, on CPU tensors that pretend to be there."""

import pytest
import torch

from radial_attn import radial_attention
from radial_attn.block_mask import Part
from radial_attn.dispatch import obstacle, order_key
from radial_attn.kernels import sage
from radial_attn.kernels.blocks import op as blocks
from radial_attn.kernels.contract import Call
from radial_attn.partial import partial_attention
from radial_attn.residual import Residual
from tests.support.attention_cases import GRIDS, fresh_mask, make_inputs
from tests.support.pretended_cuda import GPU, OnGpu, on_gpu, pretended_cuda

GRID, LENGTHS = GRIDS[111], [3, 11]

pytestmark = pytest.mark.usefixtures("one_thread")


def attend(inputs, mask, *, backward: bool, **options) -> list[torch.Tensor]:
    """Returns the output and the gradients of query, key and value, the latter if `backward`."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs[:3]]
    out = radial_attention(*leaves, mask, **options)
    if not out.requires_grad and backward:  # an operator that ran in Python
        lse, lengths = on_gpu(torch.zeros(out.shape[:3])), options["text_lengths"]
        lengths = lengths and torch.tensor(lengths)
        call = inputs[3], *leaves, out, lse, mask
        return [out, *blocks.backward(*call, text_lengths=lengths, scale=out.shape[-1] ** -0.5)]
    return [out.detach(), *(torch.autograd.grad(out, leaves, inputs[3]) if backward else ())]


@pytest.mark.parametrize(("lengths", "heads"), [(None, None), (LENGTHS, 3)], ids=["shared", "padded"])
@pytest.mark.parametrize(
    ("backend", "far_field", "backward"),
    [
        ("blocks", "none", True),
        ("blocks", "mean", False),
        ("blocks", "linear", False),
        ("flex", "none", True),
        ("reference", "none", True),
        ("reference", "linear", False),
    ],
)
def test_backends(backend, far_field, backward, lengths, heads, monkeypatch):  # noqa: PLR0917
    inputs = make_inputs(GRID, 2, 3, 16)
    options = {"far_field": far_field, "text_lengths": lengths, "backward": backward}
    mask = fresh_mask(GRID, heads=heads)
    expected = attend(inputs, mask, **options, backend="reference")
    with pretended_cuda(monkeypatch) as mode:
        actual = attend([on_gpu(x) for x in inputs], mask, **options, backend=backend)
        assert mode.asked and all(isinstance(x, OnGpu) for x in actual)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-5)


def test_partial_attention_gives_the_log_sum_exp(monkeypatch):
    """The tuner of Triton's kernels once took zeros of `dense_any` for it."""
    mask, inputs = fresh_mask(GRID), make_inputs(GRID, 2, 3, 16)[:3]
    part, lengths = Part(mask.blocks, mask.block_size, GRID.text, GRID.text), torch.tensor(LENGTHS)
    expected = partial_attention(*inputs, part, backend="reference", text_lengths=lengths)
    with pretended_cuda(monkeypatch):
        part = Part(mask.blocks.clone(), mask.block_size, GRID.text, GRID.text)
        actual = partial_attention(*map(on_gpu, inputs), part, backend="blocks", text_lengths=lengths)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.as_subclass(torch.Tensor), want, rtol=1e-4, atol=1e-5)


def test_masks_residuals_and_orders(monkeypatch):
    with pretended_cuda(monkeypatch):
        check_masks_residuals_and_orders()


def check_masks_residuals_and_orders():
    mask = fresh_mask(GRID, heads=2)
    for host, there in zip(mask.csr("cpu"), mask.csr(GPU), strict=True):
        assert isinstance(there, OnGpu) and torch.equal(host, there.cpu())
    dense, lacking = (on_gpu(torch.randn(1, 100, 2, 8)) for _ in range(2))
    for kind in ("mean", "int8", "int4"):
        kept = Residual.of(kind, dense, lacking, 16)
        there = kept.to_host()
        assert isinstance(kept.values, OnGpu) and not isinstance(there.values, OnGpu)
        assert torch.equal(there.add_to(lacking), kept.add_to(lacking))
    assert order_key(GPU) in {"sm90", "cuda"}
    assert sage.block_shape("spas_sage_attn", GPU) == (64, 128)
    call = Call(GPU, torch.float32, 16, False, mask)
    assert obstacle("blocks", call) is None and "got a tensor on cuda" in obstacle("cpp", call)
