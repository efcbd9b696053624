"""What is Mochi's own: padded text, rising timesteps, attention past diffusers' dispatch, its pipeline."""

import pytest
import torch
from diffusers import MochiPipeline

from radial_attn import TokenGrid
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.schedule import StepCounter
from tests.support.auto_backend import AUTO
from tests.support.families import DENSE, FULL, SPARSE, masked_upstream, run
from tests.support.tiny_mochi import mochi_inputs, mochi_pipeline, mochi_transformer

GRID = TokenGrid(6, 6, 8, 7)
LENGTHS = [(5, 0), (7, 7), (1, 7), (7, 3)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_samples_have_text_of_their_own_length(lengths, backend):
    transformer, inputs = mochi_transformer(), mochi_inputs(batch=2, lengths=lengths)
    expected, sparse = run(transformer, inputs), masked_upstream(transformer, GRID, inputs)
    with apply_radial_attention(transformer, FULL, backend=backend):
        torch.testing.assert_close(run(transformer, inputs), expected, atol=1e-5, rtol=0)
    with apply_radial_attention(transformer, SPARSE, backend=backend, check="reference"):
        torch.testing.assert_close(run(transformer, inputs), sparse, atol=1e-5, rtol=0)


def streams(transformer, inputs):
    """Video and text as each block returns them."""
    found = []
    hooks = [
        block.register_forward_hook(lambda block, args, output: found.extend(output))
        for block in transformer.transformer_blocks
    ]
    run(transformer, inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("lengths", LENGTHS)
def test_both_streams_are_those_of_upstream_padding_too(lengths):
    transformer, inputs = mochi_transformer(), mochi_inputs(batch=2, lengths=lengths)
    expected = streams(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        found = streams(transformer, inputs)
    assert len(found) == len(expected) == 2 * 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_padded_text_is_never_attended():
    transformer, inputs = mochi_transformer(), mochi_inputs(batch=2, lengths=(5, 3))
    other = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][~inputs["encoder_attention_mask"]] += 1
    with apply_radial_attention(transformer, SPARSE):
        assert torch.equal(run(transformer, other), run(transformer, inputs))


def test_valid_text_must_come_first():
    inputs = mochi_inputs()
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(1)
    with (
        apply_radial_attention(transformer := mochi_transformer(), SPARSE),
        pytest.raises(ValueError, match="valid text tokens must come first"),
    ):
        run(transformer, inputs)


def test_dense_attention_is_past_the_dispatch():
    transformer = mochi_transformer()
    with apply_radial_attention(transformer, DENSE) as handle:
        run(transformer, mochi_inputs())
        assert handle.report()["dense_backend"] == {"name": "auto", "backend": "native", "seconds": {}}
    message = r"dense_backend must be one of auto, native, sage for .*'_native_math'"
    with pytest.raises(ValueError, match=message):
        apply_radial_attention(transformer, DENSE, dense_backend="_native_math")
    assert not transformer._forward_pre_hooks


def test_rising_timesteps():
    counter = StepCounter(rising=True)
    steps = [counter.advance(torch.tensor([float(time)]))[0] for time in (0, 0, 100, 900, 0, 900, 400)]
    assert steps == [0, 0, 1, 2, 0, 1, 0]
    assert (counter.videos_begun, counter.steps_begun) == (3, 6)


def generate(pipeline, steps=4, **more):
    options = {"height": 64, "width": 96, "num_frames": 19, "guidance_scale": 3.0, "max_sequence_length": 16}
    options |= {"generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipeline(prompt="a red dot", num_inference_steps=steps, **(options | more)).frames


def test_pipeline_saved_and_loaded(tmp_path):
    pipeline = mochi_pipeline()
    dense = generate(pipeline, negative_prompt="bad")
    pipeline.save_pretrained(tmp_path)
    loaded = MochiPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    options = {"dense_steps": 1, "dense_last_steps": 1, "dense_layers": 1}
    videos = []
    for each in (pipeline, loaded):
        with apply_radial_attention(each, SPARSE, check="reference", **options) as handle:
            videos.append(generate(each, negative_prompt="bad"))
            report = handle.report()
        assert each.scheduler.timesteps.diff().min() > 0
        assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 4, 2)
        assert report["calls"] == {"dense": 2 * 4 + 2, AUTO: 2 * 3}
        assert report["grid"] == [4, 4, 6] and report["check"]["worst"]["relative_l2"] < 1e-6
    torch.testing.assert_close(videos[1], videos[0], atol=1e-5, rtol=0)
    assert (videos[0] - dense).abs().max() > 1e-3
    assert torch.equal(generate(pipeline, negative_prompt="bad"), dense)


def test_pipeline_without_negative_text():
    """An empty prompt counts as no valid token where the pipeline zeroes it."""
    pipeline = mochi_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    latents = {"output_type": "latent", "negative_prompt": ""}
    expected = generate(pipeline, **latents)
    with apply_radial_attention(pipeline, FULL, backend="blocks"):
        torch.testing.assert_close(generate(pipeline, **latents), expected, atol=1e-4, rtol=0)
