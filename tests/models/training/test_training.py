"""The Wan fork under LoRA, gradient checkpointing and torch.compile."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from radial_attn import RadialConfig
from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.tiny import wan_inputs, wan_transformer
from tests.support.training_cases import OPTIONS, SPARSE, assert_same_gradients, gradients, video

FULL = RadialConfig(decay_factor=1e6, block_size=16, decimation_width=1)


def lora_transformer():
    transformer = wan_transformer()
    torch.manual_seed(1)
    targets = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    return transformer


def test_lora_gradients():
    transformer = lora_transformer()
    expected = gradients(transformer)
    assert len(expected) == 4 * 4 * 2 and all("lora" in name for name in expected)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_same_gradients(gradients(transformer), expected)


@pytest.mark.parametrize("make", [wan_transformer, lora_transformer])
def test_gradient_checkpointing(make):
    transformer = make().train()
    expected = gradients(transformer)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer), expected)


def test_checkpointed_blocks_keep_the_mask_of_their_own_call():
    """Two calls of other grids and steps, then one backward pass that runs the blocks of both again."""
    transformer = wan_transformer().train()
    calls = [wan_inputs(timestep=900), wan_inputs(5, 8, 12, timestep=400)]

    def accumulated():
        transformer.zero_grad()
        sum(transformer(**inputs).sample.square().mean() for inputs in calls).backward()
        return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

    with apply_radial_attention(transformer, SPARSE, dense_steps=1):
        expected = accumulated()
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(accumulated(), expected)


def test_random_timesteps_in_training_are_all_radial():
    transformer = wan_transformer().train()
    with apply_radial_attention(transformer, SPARSE) as handle:
        for timestep in (300, 800, 100, 100, 999):
            gradients(transformer, timestep=torch.tensor([float(timestep)]))
        assert handle.report()["calls"] == {AUTO: 5 * 4}


def test_compiled_blocks_need_at_most_four_graphs():
    """Over a run with dense steps, dense layers and guidance; a second video needs none."""
    torch._dynamo.reset()
    transformer, counter = wan_transformer(num_layers=10), CompileCounter()
    with apply_radial_attention(transformer, SPARSE, **OPTIONS) as handle:
        expected = video(transformer)
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(video(transformer), expected, atol=1e-5, rtol=0)
        assert counter.frame_count <= 4
        graphs = counter.frame_count
        torch.testing.assert_close(video(transformer), expected, atol=1e-5, rtol=0)
        assert counter.frame_count == graphs
        assert handle.report()["calls"][AUTO] == 3 * 3 * 2 * 8


def test_compiled_blocks_follow_the_grid():
    """Two resolutions through the same compiled blocks, back and forth."""
    torch._dynamo.reset()
    transformer = wan_transformer()
    sizes = [{}, {"frames": 4, "height": 8}, {}]
    with apply_radial_attention(transformer, SPARSE, **OPTIONS):
        expected = [video(transformer, **size) for size in sizes]
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        for size, output in zip(sizes, expected, strict=True):
            torch.testing.assert_close(video(transformer, **size), output, atol=1e-5, rtol=0)


def test_a_compiled_transformer_runs_and_is_unwrapped():
    torch._dynamo.reset()
    transformer = wan_transformer()
    compiled = torch.compile(transformer, backend="eager")
    with apply_radial_attention(transformer, SPARSE, **OPTIONS):
        expected = video(transformer)
    with apply_radial_attention(compiled, SPARSE, **OPTIONS) as handle:
        torch.testing.assert_close(video(compiled), expected, atol=1e-5, rtol=0)
        assert handle.report()["steps"] == 6


def test_compiled_blocks_have_gradients():
    torch._dynamo.reset()
    transformer = wan_transformer()
    with apply_radial_attention(transformer, SPARSE):
        expected = gradients(transformer)
        transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert_same_gradients(gradients(transformer), expected)
