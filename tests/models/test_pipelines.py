"""Pipelines of every kind through the forks: schedules, saving, batches, experts, guidance."""

from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import WanBlocks

from radial_attn.models import apply_radial_attention
from tests.support.auto_backend import AUTO
from tests.support.families import DENSE, FULL, SPARSE, assert_near, run
from tests.support.pipelines import CALL, KINDS, generate
from tests.support.tiny import quiet, wan_pipeline
from tests.support.tiny_hunyuan import hunyuan_pipeline
from tests.support.tiny_minimax_h3 import minimax_h3_modular
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_wan import vace_inputs, vace_pipeline

kinds = pytest.mark.parametrize("name", KINDS)
PROMPTS = ["a red dot", "a dog that runs"]


@kinds
def test_schedule_and_density_one(name):
    """Gives the dense video with a mixed schedule at density 1.0; afterwards nothing is left."""
    kind, steps = KINDS[name], 6
    tolerance = 1e-5 if name.startswith("hunyuan") else 1e-4
    pipeline = kind.make()
    expected = kind.generate(pipeline, steps)
    options = {"dense_steps": 2, "dense_last_steps": 1, "dense_layers": 1}
    with apply_radial_attention(pipeline, FULL, backend="blocks", **options) as handle:
        torch.testing.assert_close(kind.generate(pipeline, steps), expected, atol=tolerance, rtol=0)
        report = handle.report()
    layers, always = (6, 2) if name.startswith("vace") else (4, 1)  # control layer 0 feeds layer 0
    assert (report["layers"], report["dense_layers"]) == (layers, always)
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 6, 3)
    calls = {"dense": 3 * (layers + always), "blocks": 3 * (layers - always)}
    assert report["calls"] == {backend: kind.halves * count for backend, count in calls.items()}
    assert report["grid"] == list(kind.grid)
    assert torch.equal(kind.generate(pipeline, steps), expected)


@kinds
def test_sparse_videos_of_a_pipeline_saved_and_loaded(name, tmp_path):
    """Makes latents, then frames of another size; each output is compared with the definition."""
    kind = KINDS[name]
    pipeline = kind.make()
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(type(pipeline).from_pretrained(tmp_path))
    more = {"num_frames": 9} | ({} if "reference" in name else {"output_type": "pt"})
    more |= {} if name.startswith("ltx") else {"height": 48}
    videos = [[], []]
    for each, outputs in zip((pipeline, loaded), videos, strict=True):
        with apply_radial_attention(each, SPARSE, dense_steps=1, check="reference") as handle:
            outputs.append(kind.generate(each, 4))
            outputs.append(kind.generate(each, 2, **more))
            report = handle.report()
        assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 6, 2)
        assert len(report["grids"]) == 2 and report["check"]["worst"]["relative_l2"] < 1e-6
    for one, other in zip(*videos, strict=True):
        assert_near(other, one)
    assert (kind.generate(pipeline, 4) - videos[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "tolerance"), [("wan", 1e-4), ("hunyuan_video", 1e-5)])
def test_a_batch_equals_single_videos(name, tolerance):
    kind = KINDS[name]
    pipeline = kind.make()
    latents = torch.randn(2, 4, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    options = {"dense_steps": 1, "dense_last_steps": 1, "dense_layers": 1}
    with apply_radial_attention(pipeline, SPARSE, **options):
        both = kind.generate(pipeline, prompt=PROMPTS, latents=latents)
        for index, prompt in enumerate(PROMPTS):
            one = kind.generate(pipeline, prompt=prompt, latents=latents[index : index + 1])
            torch.testing.assert_close(both[index : index + 1], one, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["wan-a14b", "wan-i2v-a14b", "vace-a14b"])
def test_both_experts_take_part(name):
    kind = KINDS[name]
    pipeline = kind.make()
    kind.generate(pipeline, 6)
    boundary = 1000 * pipeline.config.boundary_ratio
    assert 1 < int((pipeline.scheduler.timesteps >= boundary).sum()) < 5


def test_only_the_second_expert():
    """The pipeline of VACE may come with one transformer under either name."""
    pipeline = vace_pipeline(experts=2)
    pipeline.transformer, pipeline.transformer_2 = None, pipeline.transformer
    with apply_radial_attention(pipeline, SPARSE) as handle:
        run(pipeline.transformer_2, vace_inputs())
        assert handle.report()["calls"] == {AUTO: 6}


@pytest.mark.parametrize(
    ("guidance", "halves"),
    [({}, 1), ({"negative_prompt": ["no", "nothing else"], "true_cfg_scale": 3.0}, 2)],
    ids=["embedded", "true"],
)
def test_guidance_of_hunyuan_video(guidance, halves):
    """Makes a batch of prompts of different lengths, with embedded guidance and with a second call."""
    pipeline, options = hunyuan_pipeline(), KINDS["hunyuan_video"].options | {"prompt": PROMPTS} | guidance
    expected = generate(pipeline, **options)
    for config, tolerance, backend in ((DENSE, 0, "dense"), (FULL, 1e-5, "blocks")):
        with apply_radial_attention(pipeline, config) as handle:
            actual, report = generate(pipeline, **options), handle.report()
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
        assert report["steps"] == 3 and report["calls"] == {backend: 3 * 4 * halves}


def test_mochi_without_negative_text():
    """An empty prompt counts as no valid token if the pipeline zeroes it."""
    pipeline, kind = mochi_pipeline(), KINDS["mochi"]
    pipeline.register_to_config(force_zeros_for_empty_prompt=True)
    expected = kind.generate(pipeline, negative_prompt="")
    with apply_radial_attention(pipeline, FULL, backend="blocks"):
        actual = kind.generate(pipeline, negative_prompt="")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("guidance", "halves"), [(3.0, 2), (1.0, 1)])
def test_further_videos_and_what_is_left(guidance, halves):
    """Changes the number of steps; one and two steps are all dense; then the pipeline is as before."""
    pipeline, scale = wan_pipeline(), {"guidance_scale": guidance}
    dense = {steps: generate(pipeline, steps, **scale) for steps in (1, 2, 3)}
    options = {"dense_steps": 1, "dense_last_steps": 1, "dense_layers": 1}
    with apply_radial_attention(pipeline, SPARSE, **options) as handle:
        first = generate(pipeline, 4, **scale)
        report = handle.report()
        assert torch.equal(generate(pipeline, 4, **scale), first)
        for steps in (1, 1, 2):
            assert torch.equal(generate(pipeline, steps, **scale), dense[steps])
        final = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 4, 2)
    assert report["calls"] == {"dense": halves * (2 * 4 + 2 * 1), AUTO: halves * 2 * 3}
    assert (final["videos"], final["steps"], final["dense_steps"]) == (5, 12, 8)
    assert torch.equal(generate(pipeline, 3, **scale), dense[3])


def test_num_steps_overrides_the_scheduler():
    pipeline = wan_pipeline()
    with apply_radial_attention(pipeline, SPARSE, dense_last_steps=1, num_steps=5) as handle:
        generate(pipeline, 4)
        assert handle.report()["dense_steps"] == 0


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
def test_resolutions_and_pipelines_do_not_disturb_each_other(name):
    generate, first, second = KINDS[name].generate, KINDS[name].make(seed=0), KINDS[name].make(seed=5)
    small, expected = {"height": 48, "width": 64, "num_frames": 9}, []
    for size in ({}, small):
        with apply_radial_attention(first, SPARSE):
            expected.append(generate(first, **size))
    with apply_radial_attention(first, SPARSE) as one, apply_radial_attention(second, FULL) as two:
        assert torch.equal(generate(first), expected[0])
        generate(second, **small)
        for size, output in (({}, expected[0]), (small, expected[1])):
            assert torch.equal(generate(first, **size), output)
        assert [entry["grid"] for entry in one.report()["grids"]] == [[4, 4, 6], [3, 3, 4]]
        assert two.report()["grid"] == [3, 3, 4] and two.report()["density"] == 1.0


def wan_modular() -> tuple[ModularPipeline, dict[str, Any]]:
    """Makes Wan's blocks as a pipeline, which has two calls a step, and the arguments of a video."""
    pipeline, parts = WanBlocks().init_pipeline(), wan_pipeline().components
    names = "transformer", "vae", "text_encoder", "tokenizer", "scheduler"
    pipeline.update_components(**{name: parts[name] for name in names})
    return pipeline, CALL | {"num_inference_steps": 4}


@pytest.mark.parametrize(("make", "halves"), [(wan_modular, 2), (minimax_h3_modular, 1)])
def test_modular_pipelines(make, halves):
    """Steps are counted without a callback, and the dense video comes back at density 1.0 and after."""
    pipeline, call = make()

    def generate() -> torch.Tensor:
        return pipeline(**call, generator=torch.Generator().manual_seed(0), output="latents")

    expected = generate()
    with apply_radial_attention(
        pipeline, FULL, backend="blocks", dense_steps=1, dense_last_steps=1
    ) as handle:
        torch.testing.assert_close(generate(), expected, atol=1e-4, rtol=0)
        report = handle.report()
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 4, 2)
    assert report["calls"] == {"dense": 8 * halves, "blocks": 8 * halves}
    with apply_radial_attention(pipeline, SPARSE, check="reference") as handle:
        assert (generate() - expected).abs().max() > 1e-3 and handle.report()["density"] < 0.95
    assert torch.equal(generate(), expected)
