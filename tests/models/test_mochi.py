"""What is Mochi's own: both streams, padded text, rising timesteps, attention past diffusers' dispatch."""

import pytest
import torch

from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.schedule import StepCounter
from tests.support.families import DENSE, FULL, LENGTHS, assert_near, run
from tests.support.tiny_mochi import mochi_inputs, mochi_transformer


def streams(transformer, inputs):
    """Returns video and text as each block returns them."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda block, args, output: outputs.extend(output))
        for block in transformer.transformer_blocks
    ]
    run(transformer, inputs)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("lengths", LENGTHS)
def test_both_streams_are_those_of_upstream_padding_too(lengths):
    transformer, inputs = mochi_transformer(), mochi_inputs(lengths=lengths)
    expected = streams(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        outputs = streams(transformer, inputs)
    assert len(outputs) == len(expected) == 2 * 4
    for one, other in zip(outputs, expected, strict=True):
        assert_near(one, other)


def test_dense_attention_is_past_the_dispatch():
    transformer = mochi_transformer()
    with apply_radial_attention(transformer, DENSE) as handle:
        run(transformer, mochi_inputs())
        assert handle.report()["dense_backend"] == {"name": "auto", "backend": "native", "seconds": {}}
    message = r"dense_backend must be one of auto, native, sage, flash4 for .*'_native_math'"
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(transformer, DENSE, dense_backend="_native_math")
    assert not transformer._forward_pre_hooks


def test_rising_timesteps():
    counter = StepCounter(rising=True)
    steps = [counter.advance(torch.tensor([float(time)]))[0] for time in (0, 0, 100, 900, 0, 900, 400)]
    assert steps == [0, 0, 1, 2, 0, 1, 0]
    assert (counter.videos_begun, counter.steps_begun) == (3, 6)
