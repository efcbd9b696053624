"""The relatives of Wan as pipelines: image to video, Wan2.2 A14B and TI2V-5B, VACE."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.output_check import CheckError
from tests.support.auto_backend import AUTO
from tests.support.failing_kernel import fail, one_nan
from tests.support.families import FULL, SPARSE, run
from tests.support.tiny import wan_pipeline
from tests.support.tiny_wan import (
    a14b_i2v_pipeline,
    i2v_pipeline,
    ti2v_pipeline,
    vace_inputs,
    vace_pipeline,
    vace_transformer,
)

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
TO_VIDEO = {"image": IMAGE}
EXPERTS = {"guidance_scale_2": 2.0}
PIPELINES = {
    "t2v-a14b": (partial(wan_pipeline, experts=2), EXPERTS),
    "i2v": (i2v_pipeline, TO_VIDEO),
    "i2v-a14b": (a14b_i2v_pipeline, TO_VIDEO | EXPERTS),
    "ti2v": (ti2v_pipeline, {}),
    "ti2v-image": (partial(ti2v_pipeline, image=True), TO_VIDEO),
    "vace": (vace_pipeline, {}),
    "vace-a14b": (partial(vace_pipeline, experts=2), EXPERTS),
    "vace-reference": (vace_pipeline, {"reference_images": [IMAGE]}),
}
pipelines = pytest.mark.parametrize("name", PIPELINES)


def generate(pipeline, steps=6, *, frames=13, height=64, width=96, output="latent", **more):
    size = {"num_frames": frames, "height": height, "width": width, "output_type": output}
    options = {"guidance_scale": 3.0, "max_sequence_length": 16, **size, **more}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="a red dot", num_inference_steps=steps, generator=generator, **options).frames


@pipelines
def test_schedule_and_density_one(name):
    """A mixed schedule at density 1.0 is the dense video; afterwards nothing is left."""
    make, more = PIPELINES[name]
    pipeline = make()
    expected = generate(pipeline, **more)
    options = {"dense_steps": 2, "dense_last_steps": 1, "dense_layers": 1}
    with apply_radial_attention(pipeline, FULL, backend="blocks", **options) as handle:
        torch.testing.assert_close(generate(pipeline, **more), expected, atol=1e-4, rtol=0)
        report = handle.report()
    layers, always = (6, 2) if name.startswith("vace") else (4, 1)  # control layer 0 feeds layer 0
    assert (report["layers"], report["dense_layers"]) == (layers, always)
    assert (report["videos"], report["steps"], report["dense_steps"]) == (1, 6, 3)
    assert report["calls"] == {"dense": 2 * 3 * (layers + always), "blocks": 2 * 3 * (layers - always)}
    assert report["grid"] == [5 if name == "vace-reference" else 4, 4, 6]
    assert torch.equal(generate(pipeline, **more), expected)


@pipelines
def test_sparse_videos_of_a_pipeline_saved_and_loaded(name, tmp_path):
    """Two sizes and numbers of steps; the outputs are compared with the definition as they come."""
    make, more = PIPELINES[name]
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    if "reference_images" not in more:
        more = more | {"output": "pt"}
    videos = [[], []]
    for each, found in zip((pipeline, loaded), videos, strict=True):
        with apply_radial_attention(each, SPARSE, dense_steps=1, check="reference") as handle:
            found += [generate(each, 4, **more), generate(each, 2, frames=9, height=48, **more)]
            report = handle.report()
        assert (report["videos"], report["steps"], report["dense_steps"]) == (2, 6, 2)
        assert len(report["grids"]) == 2 and report["check"]["worst"]["relative_l2"] < 1e-6
    for one, other in zip(*videos, strict=True):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=0)
    assert (generate(pipeline, 4, **more) - videos[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["i2v", "vace"])
def test_cross_attention_is_untouched(name):
    transformer = PIPELINES[name][0]().transformer
    blocks = [*transformer.blocks, *getattr(transformer, "vace_blocks", [])]
    before = [block.attn2.processor for block in blocks]
    with apply_radial_attention(transformer, SPARSE):
        assert all(block.attn2.processor is one for block, one in zip(blocks, before, strict=True))


@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "vace-a14b"])
def test_both_experts_take_part(name):
    make, more = PIPELINES[name]
    pipeline = make()
    generate(pipeline, **more)
    boundary = 1000 * pipeline.config.boundary_ratio
    assert 1 < int((pipeline.scheduler.timesteps >= boundary).sum()) < 5


def test_control_layers_are_dense_with_the_layer_that_they_feed():
    transformer, dense = vace_transformer(), {}
    for count in range(5):
        with apply_radial_attention(transformer, SPARSE, dense_layers=count) as handle:
            processors = [
                [b.attn1.processor.dense for b in x] for x in (transformer.vace_blocks, transformer.blocks)
            ]
            dense[count] = tuple(map(sum, processors))
            assert handle.report()["dense_layers"] == sum(dense[count])
    assert dense == {0: (0, 0), 1: (1, 1), 2: (1, 2), 3: (2, 3), 4: (2, 4)}
    with pytest.raises(ValueError, match=r"dense_layers must be at most 4, .*got 5"):
        apply_radial_attention(transformer, SPARSE, dense_layers=5)


@pytest.mark.parametrize("call, name", [(1, "control layer 1"), (2, "layer 0"), (5, "layer 3")])
def test_the_guard_names_layer_and_control_layer(call, name, monkeypatch):
    """Control layers run first, so a fault in one is not laid at the door of those that read its output."""
    fail(monkeypatch, call, one_nan)
    transformer = vace_transformer()
    with (
        apply_radial_attention(transformer, SPARSE, check="nan"),
        pytest.raises(CheckError, match=f"non-finite attention output in {name} at step 1, float32"),
    ):
        run(transformer, vace_inputs())


def test_only_the_second_expert():
    """The pipeline of VACE may come with one transformer under either name."""
    pipeline = vace_pipeline(experts=2)
    pipeline.transformer, pipeline.transformer_2 = None, pipeline.transformer
    with apply_radial_attention(pipeline, SPARSE) as handle:
        run(pipeline.transformer_2, vace_inputs())
        assert handle.report()["calls"] == {AUTO: 6}
