"""The forks of HunyuanVideo under LoRA, gradient checkpointing, torch.compile and the guard."""

import pytest
import torch
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.output_check import CheckError
from tests.support.auto_backend import AUTO
from tests.support.failing_kernel import fail, one_nan, twice
from tests.support.hunyuan_cases import FULL, SPARSE, assert_near, families, run
from tests.support.tiny_hunyuan import FAMILIES, TEXT, hunyuan_inputs, hunyuan_transformer
from tests.support.training_cases import assert_same_gradients

OPTIONS = {"dense_steps": 1, "dense_layers": 1, "dense_last_steps": 1, "num_steps": 4}
LORA = LoraConfig(
    r=2,
    lora_alpha=2,
    target_modules=r".*blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
    init_lora_weights=False,
)


def gradients(transformer, *calls):
    """Gradient of the sum of the mean square outputs of calls for every trainable parameter."""
    transformer.zero_grad()
    sum(transformer(**inputs).sample.square().mean() for inputs in calls).backward()
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def with_lora(family):
    transformer = family.transformer().train()
    torch.manual_seed(1)
    transformer.add_adapter(LORA)
    return transformer


@families
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_upstream(family, lora):
    """Of padded text too: what upstream computes for it reaches no loss."""
    transformer = with_lora(family) if lora else family.transformer().train()
    inputs = family.sized(4, 4, 4, lengths=(4, TEXT))
    expected = gradients(transformer, inputs)
    assert all("lora" in name for name in expected) is lora
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_same_gradients(gradients(transformer, inputs), expected)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, inputs), expected)


@families
def test_checkpointed_blocks_keep_the_mask_and_text_of_their_own_call(family):
    transformer = with_lora(family)
    calls = family.sized(timestep=900.0, lengths=(4, 9)), family.sized(5, 4, 6, timestep=400.0, lengths=(2,))
    with apply_radial_attention(transformer, SPARSE, dense_steps=1):
        expected = gradients(transformer, *calls)
        transformer.enable_gradient_checkpointing()
        assert_same_gradients(gradients(transformer, *calls), expected)


def video(family, transformer, steps=4, size=(4, 4, 6)):
    """Outputs of a denoising loop with guidance: the halves have prompts of other lengths, one is full."""
    outputs = []
    for timestep in torch.linspace(1000, 100, steps).tolist():
        for seed, length in enumerate((4, TEXT)):
            inputs = family.sized(*size, timestep=timestep, lengths=(length,), seed=seed)
            outputs.append(run(transformer, inputs))
    return torch.stack(outputs)


@pytest.mark.parametrize(("family", "graphs"), zip(FAMILIES, (9, 5), strict=True), ids=["1.0", "1.5"])
def test_compiled_blocks_need_few_graphs(family, graphs):
    """Two for the inputs; for each kind of block a radial and a dense one, another for its dense layers.

    The guard and the text lengths add none, nor does a second video.
    """
    torch._dynamo.reset()
    transformer, counter = family.transformer(), CompileCounter()
    with apply_radial_attention(transformer, SPARSE, check="nan", **OPTIONS) as handle:
        expected = video(family, transformer)
        transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        assert_near(video(family, transformer), expected)
        assert counter.frame_count <= graphs + (torch.__version__ < "2.9")  # torch 2.8 makes one more
        before = counter.frame_count
        assert_near(video(family, transformer), expected)
        assert counter.frame_count == before
        assert handle.report()["calls"] == {"dense": 3 * 2 * (2 * 4 + 2), AUTO: 3 * 2 * 2 * 3}


def test_compiled_blocks_follow_the_grid():
    family, sizes = FAMILIES[0], [(4, 4, 6), (3, 5, 7), (4, 4, 6)]
    torch._dynamo.reset()
    transformer = family.transformer(num_layers=1, num_single_layers=1)
    with apply_radial_attention(transformer, SPARSE):
        expected = [video(family, transformer, 1, size) for size in sizes]
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(fullgraph=True, backend="eager")
        for size, output in zip(sizes, expected, strict=True):
            assert_near(video(family, transformer, 1, size), output)


def test_a_compiled_transformer():
    """Of HunyuanVideo 1.5, which breaks the graph at its sorting of the text."""
    family = FAMILIES[1]
    torch._dynamo.reset()
    transformer = family.transformer(num_layers=2)
    compiled = torch.compile(transformer, backend="eager")
    with apply_radial_attention(transformer, SPARSE):
        expected = video(family, transformer, 2)
    with apply_radial_attention(compiled, SPARSE):
        assert_near(video(family, compiled, 2), expected)


@families
@pytest.mark.parametrize("lengths", [(TEXT,), (4, 9)], ids=str)
def test_reference_check_finds_no_error(family, lengths):
    """Rows of padded text are zeros in the definition too."""
    transformer = family.transformer()
    with apply_radial_attention(transformer, SPARSE, check="reference", dense_layers=1) as handle:
        for size in ((6, 6, 8), (5, 3, 7), (6, 6, 8)):
            run(transformer, family.sized(*size, lengths=lengths))
        report = handle.report()["check"]
    assert report["compared"] == 2 * 3 and report["worst"]["relative_l2"] < 1e-6


@pytest.mark.parametrize(
    ("check", "how", "message"),
    [
        ("nan", one_nan, f"non-finite attention output in layer 3 at step 1, float32, backend {AUTO}"),
        ("reference", twice, f"wrong attention output in layer 3 at step 1, float32, backend {AUTO}"),
    ],
)
def test_the_guard_names_the_layer(check, how, message, monkeypatch):
    """Single blocks count on from the double ones."""
    transformer = hunyuan_transformer()
    fail(monkeypatch, 2, how)
    options = {"check": check, "dense_layers": 1}
    with (
        apply_radial_attention(transformer, SPARSE, **options),
        pytest.raises(CheckError, match=message),
    ):
        run(transformer, hunyuan_inputs(lengths=(4, TEXT)))


@families
def test_autocast(family):
    transformer, inputs = family.transformer(), family.sized(lengths=(4, 9))
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(transformer, inputs)
        with apply_radial_attention(transformer, FULL, backend="blocks"):
            found = run(transformer, inputs)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() / expected.abs().max() < 4 * torch.finfo(torch.bfloat16).eps


def test_steps_are_counted_with_guidance():
    family = FAMILIES[0]
    transformer = family.transformer()
    with apply_radial_attention(transformer, SPARSE, **OPTIONS) as handle:
        video(family, transformer)
        video(family, transformer)
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 8, 4)
