"""The pipelines of HunyuanVideo through the fork: text to video, and image to video of both kinds."""

import pytest
import torch
from diffusers import HunyuanVideoPipeline
from PIL import Image

from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.hunyuan_cases import DENSE, FULL, SPARSE, assert_near
from tests.support.tiny_hunyuan import TEMPLATE, hunyuan_image_pipeline, hunyuan_pipeline

OPTIONS = {"dense_steps": 1, "dense_last_steps": 1, "dense_layers": 1}


def generate(pipeline, steps=3, *, prompt="a red dot", frames=13, size=(64, 96), seed=0, **more):
    return pipeline(
        prompt=prompt,
        prompt_template=TEMPLATE,
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        **({"output_type": "latent"} | more),
    ).frames


def test_a_saved_pipeline_runs_through_the_fork(tmp_path):
    """Steps and layers of the schedule, then without a trace what it was before."""
    pipeline = hunyuan_pipeline()
    expected = generate(pipeline, 4, output_type="pt")
    assert expected.shape == (1, 13, 3, 64, 96)
    pipeline.save_pretrained(tmp_path)
    loaded = HunyuanVideoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded, 4, output_type="pt"), expected, atol=1e-5, rtol=0)
    with apply_radial_attention(loaded, SPARSE, check="reference", **OPTIONS) as handle:
        sparse = generate(loaded, 4, output_type="pt")
        report = handle.report()
    assert (sparse - expected).abs().max() > 1e-4
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 4, 2)
    assert report["calls"] == {"dense": 2 * 4 + 2 * 1, AUTO: 2 * 3} and report["grid"] == [4, 4, 6]
    assert report["check"]["worst"]["relative_l2"] < 1e-6
    torch.testing.assert_close(generate(loaded, 4, output_type="pt"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "guidance",
    [{}, {"negative_prompt": ["no", "nothing else"], "true_cfg_scale": 3.0}],
    ids=["embedded", "true"],
)
def test_density_one_is_upstream(guidance):
    """A batch of prompts of other lengths; guidance as an embedding, and by a second call."""
    pipeline, prompts = hunyuan_pipeline(), ["a red dot", "a dog that runs"]
    expected = generate(pipeline, prompt=prompts, **guidance)
    for config, tolerance, backend in ((DENSE, 0, "dense"), (FULL, 1e-5, "blocks")):
        with apply_radial_attention(pipeline, config) as handle:
            found = generate(pipeline, prompt=prompts, **guidance)
            report = handle.report()
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
        assert report["steps"] == 3 and report["calls"] == {backend: 3 * 4 * (2 if guidance else 1)}


def test_a_batch_equals_single_videos():
    pipeline, prompts = hunyuan_pipeline(), ["a red dot", "a dog that runs"]
    latents = torch.randn(2, 4, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with apply_radial_attention(pipeline, SPARSE, **OPTIONS):
        both = generate(pipeline, prompt=prompts, latents=latents)
        for index, prompt in enumerate(prompts):
            one = generate(pipeline, prompt=prompt, latents=latents[index : index + 1])
            assert_near(both[index : index + 1], one)


def test_resolutions_follow_one_another():
    pipeline, sizes = hunyuan_pipeline(), [{}, {"size": (48, 80), "frames": 9}]
    expected = []
    for size in sizes:
        with apply_radial_attention(pipeline, SPARSE):
            expected.append(generate(pipeline, **size))
    with apply_radial_attention(pipeline, SPARSE) as handle:
        for size, output in zip(2 * sizes, 2 * expected, strict=True):
            assert torch.equal(generate(pipeline, **size), output)
        assert [entry["grid"] for entry in handle.report()["grids"]] == [[4, 4, 6], [3, 3, 5]]


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_image_to_video(kind):
    pipeline, image = hunyuan_image_pipeline(kind), Image.new("RGB", (96, 64), "red")
    expected = generate(pipeline, image=image)
    with apply_radial_attention(pipeline, FULL):
        assert_near(generate(pipeline, image=image), expected)
    with apply_radial_attention(pipeline, SPARSE, **OPTIONS) as handle:
        assert (generate(pipeline, image=image) - expected).abs().max() > 1e-3
        report = handle.report()
    assert report["grid"] == [4, 4, 6] and report["calls"] == {"dense": 2 * 4 + 1, AUTO: 3}
