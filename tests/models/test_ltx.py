"""What is LTX-Video's own: packed latents, and its pipeline."""

import pytest
import torch
from diffusers import LTXPipeline

from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.families import SPARSE, run
from tests.support.tiny_ltx import ltx_inputs, ltx_pipeline, ltx_transformer


def coordinates(frames: int, height: int, width: int) -> torch.Tensor:
    """`[1, 3, tokens]` of pixels, as LTXConditionPipeline gives them."""
    times = (torch.arange(frames) * 8 - 7).clamp(min=0) / 25
    axes = times, 32.0 * torch.arange(height), 32.0 * torch.arange(width)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]


def test_grid_of_coordinates():
    inputs = ltx_inputs(5, 3, 7) | {"video_coords": coordinates(5, 3, 7)}
    del inputs["num_frames"], inputs["height"], inputs["width"]
    with apply_radial_attention(transformer := ltx_transformer(), SPARSE) as handle:
        run(transformer, inputs)
        assert handle.report()["grid"] == [5, 3, 7]


def test_tokens_beside_the_video_are_an_error():
    inputs = ltx_inputs(5, 3, 7) | {"num_frames": 4}
    with (
        apply_radial_attention(transformer := ltx_transformer(), SPARSE),
        pytest.raises(ValueError, match="needs the tokens of a video alone: got 105 for TokenGrid"),
    ):
        run(transformer, inputs)


def generate(pipeline, steps=3, frames=17, **more):
    options = {
        "height": 32,
        "width": 64,
        "num_frames": frames,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
    }
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt="a red dot",
        num_inference_steps=steps,
        generator=generator,
        output_type="pt",
        **options,
        **more,
    ).frames


def test_pipeline_saved_and_loaded(tmp_path):
    pipeline = ltx_pipeline()
    dense = generate(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = LTXPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    videos = []
    for each in (pipeline, loaded):
        with apply_radial_attention(each, SPARSE, dense_steps=1, dense_layers=1, check="reference") as handle:
            videos.append(generate(each))
            report = handle.report()
        assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 3, 1)
        assert report["calls"] == {"dense": 4 + 2, AUTO: 2 * 3}
        assert report["grid"] == [5, 8, 16] and report["check"]["worst"]["relative_l2"] < 1e-6
    torch.testing.assert_close(videos[1], videos[0], atol=1e-5, rtol=0)
    assert (videos[0] - dense).abs().max() > 1e-4
    assert torch.equal(generate(pipeline), dense)
