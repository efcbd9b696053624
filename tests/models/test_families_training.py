"""The forks of Mochi, Wan-VACE and LTX-Video under LoRA, gradient checkpointing and torch.compile."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from radial_attn.models import apply_radial_attention
from tests.support.families import FAMILIES, FULL, SPARSE, Family, run
from tests.support.training_cases import assert_same_gradients

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
LORA = LoraConfig(
    r=2,
    lora_alpha=2,
    target_modules=r".*attn1\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    init_lora_weights=False,
)


def gradients(transformer, *calls):
    """Gradient of the sum of the mean square outputs of calls for every trainable parameter."""
    transformer.zero_grad()
    sum(transformer(**inputs).sample.square().mean() for inputs in calls).backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def with_lora(family: Family) -> torch.nn.Module:
    transformer = family.transformer().train()
    torch.manual_seed(1)
    transformer.add_adapter(LORA)
    return transformer


@families
def test_lora_gradients_and_checkpointing(family):
    transformer, inputs = with_lora(family), family.sized(4, 4, 4, batch=2)
    expected = gradients(transformer, inputs)
    assert all("lora" in name for name in expected)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_same_gradients(gradients(transformer, inputs), expected)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, inputs), expected)


@families
def test_checkpointed_blocks_keep_the_mask_of_their_own_call(family):
    transformer = with_lora(family)
    calls = [family.sized(batch=2), family.sized(5, 4, 6)]
    with apply_radial_attention(transformer, SPARSE):
        expected = gradients(transformer, *calls)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, *calls), expected)


def compile_blocks(transformer, **options):
    """Compiles each block; Mochi lists no repeated ones, so compile_repeated_blocks does not serve it."""
    torch._dynamo.reset()
    names = {"MochiTransformerBlock", *(transformer._repeated_blocks or [])}
    for module in transformer.modules():
        if type(module).__name__ in names:
            module.compile(**options)


def video(family, transformer, steps=3, halves=2, **more):
    """Outputs of a denoising loop, of two guidance halves unless told."""
    times = torch.linspace(100, 1000, steps) if family.name == "mochi" else torch.linspace(1000, 100, steps)
    calls = [
        family.sized(timestep=float(time), seed=half, **more) for time in times for half in range(halves)
    ]
    return torch.stack([run(transformer, inputs) for inputs in calls])


@families
@pytest.mark.parametrize("check", ["off", "nan"])
def test_compiled_blocks_do_not_recompile_with_the_steps(family, check):
    """One graph for each kind of block: Mochi's last has no text of its own, VACE has two kinds."""
    transformer, counter = family.transformer(), CompileCounter()
    with apply_radial_attention(transformer, SPARSE, check=check):
        expected = video(family, transformer)
        compile_blocks(transformer, fullgraph=True, backend=counter)
        torch.testing.assert_close(video(family, transformer), expected, atol=1e-5, rtol=0)
        graphs = counter.frame_count
        assert graphs <= {"mochi": 2, "wan_vace": 3, "ltx": 1}[family.name]
        torch.testing.assert_close(video(family, transformer, 5)[-2:], expected[-2:], atol=1e-5, rtol=0)
        assert counter.frame_count == graphs


@families
def test_compiled_blocks_follow_dense_steps_and_grids(family):
    """Mochi's own attention takes text out of the padding and breaks the graph, so not as one graph each."""
    transformer = family.transformer(num_layers=3)
    sizes = [{}, {"frames": 4, "height": 3}, {}]
    schedule = {"dense_steps": 1, "dense_layers": 1}
    with apply_radial_attention(transformer, SPARSE, **schedule):
        expected = [video(family, transformer, 2, halves=1, **size) for size in sizes]
        fullgraph = family.name != "mochi"
        compile_blocks(transformer, fullgraph=fullgraph, dynamic=False, backend="eager")
        for size, output in zip(sizes, expected, strict=True):
            found = video(family, transformer, 2, halves=1, **size)
            torch.testing.assert_close(found, output, atol=1e-5, rtol=0)
