"""The sampled reference against the whole one, and what the error says."""

import math

import pytest
import torch

from radial_attn import radial_attention
from radial_attn.analysis.sampled_error import output_error, sample_blocks, sampled_reference, sampled_rows
from radial_attn.far_field import Far
from tests.support.attention_cases import GRIDS, make_inputs, make_mask


@pytest.mark.parametrize("lengths", [None, [0, 7]])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("far_field", ["none", "mean", "linear"])
def test_sampled_rows_are_those_of_the_definition(far_field, heads, lengths):
    torch.manual_seed(0)
    grid = GRIDS[111]
    mask, tensors = make_mask(grid, heads=heads), make_inputs(grid, 2, 3, 16)[:3]
    blocks = [0, 3, 6]
    lengths = lengths and torch.tensor(lengths)
    bias = None if far_field == "none" else torch.randn(2, 3, 1, 1)
    options = {"text_lengths": lengths, "far_field": far_field, "far_bias": bias}
    whole = radial_attention(*tensors, mask, backend="reference", **options)
    far = None if bias is None else Far.of(*tensors[1:], mask, far_field, bias)
    sample = sampled_reference(*tensors, mask, blocks, text_lengths=lengths, far=far)
    torch.testing.assert_close(sample, sampled_rows(whole, mask, blocks))


def test_sample_has_both_ends():
    mask = make_mask(GRIDS[1000])
    assert sample_blocks(mask, 4) == [0, 21, 41, 62]
    assert sample_blocks(mask, 1) == [0]
    assert sample_blocks(mask, 100) == list(range(63))


def test_error():
    want = torch.tensor([3.0, 4.0])
    exact, off = output_error(want, want), output_error(torch.tensor([3.0, 4.5]), want)
    assert exact.relative_l2 == 0 and exact.cosine == pytest.approx(1)
    assert off.relative_l2 == pytest.approx(0.1) and 0.99 < off.cosine < 1
    assert str(exact) == "relative L2 0.00e+00, cosine 1.000000"
    zero = torch.zeros(2)
    assert output_error(zero, zero).relative_l2 == 0 and output_error(want, zero).relative_l2 == math.inf
    assert math.isnan(output_error(torch.tensor([math.nan, 1]), want).relative_l2)
