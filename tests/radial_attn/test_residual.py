"""What a sparse output lacked, in few bytes."""

import pytest
import torch

from radial_attn.residual import RESIDUALS, Residual, residual_bytes


def outputs(width: int = 8, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 50, 3, width, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("width", [7, 8])
def test_integers_are_off_by_half_a_step(kind, steps, width):
    dense, sparse = outputs(width)
    lacking = dense - sparse
    error = (Residual.of(kind, dense, sparse, 16).add_to(sparse) - dense).abs()
    half = 0.5 * lacking.abs().amax(-1, keepdim=True) / steps
    assert (error <= half * 1.02 + 1e-6).all()  # the scale is rounded to float16
    assert error.max() > 0.3 * half.max()


def test_means_are_those_of_the_blocks():
    dense, sparse = outputs()
    lacking = (dense - sparse).double()
    result = Residual.of("mean", dense, sparse, 16).add_to(sparse)
    for start in range(0, 50, 16):
        block = slice(start, start + 16)
        wanted = sparse[:, block] + lacking[:, block].mean(1, keepdim=True)
        torch.testing.assert_close(result[:, block], wanted.float())


@pytest.mark.parametrize("kind", RESIDUALS[1:-1])
@pytest.mark.parametrize(("width", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_memory_is_what_was_predicted(kind, width, dtype):
    dense, sparse = outputs(width, dtype)
    residual = Residual.of(kind, dense, sparse, 16)
    assert residual.bytes == 2 * residual_bytes(kind, 50, 3, width, block_size=16, itemsize=dtype.itemsize)
    assert residual.add_to(sparse).dtype == dtype
    assert torch.equal(residual.to_host().add_to(sparse), residual.add_to(sparse))


@pytest.mark.parametrize("kind", RESIDUALS[1:-1])
def test_nothing_lacks_where_both_agree(kind):
    dense, _ = outputs()
    assert torch.equal(Residual.of(kind, dense, dense, 16).add_to(dense), dense)


def test_no_residual_takes_no_memory():
    assert residual_bytes("none", 50, 3, 8, block_size=16, itemsize=4) == 0
