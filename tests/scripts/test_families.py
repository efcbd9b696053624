"""Pipelines of several families through the command, tiny and random."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from radial_attn import TokenGrid
from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from tests.support.script_cases import SMALL
from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import hunyuan15_pipeline, hunyuan_pipeline
from tests.support.tiny_kandinsky import kandinsky5_pipeline
from tests.support.tiny_ltx import ltx_pipeline
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_motif import motif_image_pipeline, motif_pipeline
from tests.support.tiny_wan_relatives import (
    anyflow_pipeline,
    chronoedit_pipeline,
    skyreels_image_pipeline,
    skyreels_pipeline,
)

RUNS = {
    "anyflow_t2v_14b": (anyflow_pipeline, ["generation.num_frames=9"]),
    "hunyuan_t2v": (hunyuan_pipeline, ["generation.num_frames=9", "generation.prompt_template=plain"]),
    "hunyuan15_t2v": (hunyuan15_pipeline, ["generation.num_frames=9"]),
    "kandinsky5_t2v_lite": (kandinsky5_pipeline, ["generation.num_frames=9"]),
    "ltx_t2v": (ltx_pipeline, ["generation.num_frames=5", "generation.height=32"]),
    "mochi_t2v": (mochi_pipeline, ["generation.num_frames=7"]),
    "motif_t2v": (motif_pipeline, ["generation.num_frames=9"]),
    "skyreels_v2_t2v_14b": (skyreels_pipeline, ["generation.num_frames=9"]),
    "wan2.2_t2v_a14b": (lambda: wan_pipeline(experts=2), ["generation.num_frames=9"]),
}
FROM_IMAGE = {
    "motif_i2v": (motif_image_pipeline, ["generation.num_frames=9"]),
    "chronoedit_14b": (chronoedit_pipeline, ["generation.num_frames=13"]),
    "skyreels_v2_i2v_14b": (skyreels_image_pipeline, ["generation.num_frames=9"]),
}


@pytest.mark.parametrize("preset", RUNS)
def test_a_tiny_random_pipeline_through_the_command(preset, tmp_path, recwarn):
    build, options = RUNS[preset]
    build().save_pretrained(tmp_path / "model")
    paths = [f"model.path={tmp_path / 'model'}", f"output.path={tmp_path / 'out.mp4'}"]
    assert main([f"configs/{preset}.yaml", *SMALL, *options, *paths]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["attention"]["steps"] == 3 and record["attention"]["dense_steps"] == 1
    assert record["attention"]["check"]["compared"] > 0
    assert record["attention"]["check"]["worst"]["relative_l2"] < 1e-5
    assert not [warning for warning in recwarn if "autocast" in str(warning.message)]


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("ltx_t2v", {"guidance_scale": 3.0, "frame_rate": 25}),
        ("hunyuan15_t2v", {}),
        ("kandinsky5_t2v_lite", {}),
        ("anyflow_t2v_14b", {}),
        ("motif_t2v", {}),
        ("motif_i2v", {}),
        ("chronoedit_14b", {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 3}),
        ("chronoedit_14b", {"num_frames": 5}),
        ("skyreels_v2_t2v_14b", {"guidance_scale": 6.0}),
        ("skyreels_v2_i2v_14b", {"guidance_scale": 5.0}),
    ],
)
def test_a_dense_run_is_that_of_diffusers(preset, given, tmp_path):
    """Calls the pipeline by its own arguments; guidance of two families is in their guider."""
    build, options = (RUNS | FROM_IMAGE)[preset]
    pipeline, keys = build(), [f"model.path={tmp_path}", "attention.pattern=dense", "attention.check=off"]
    keys += ["generation.guidance_scale=7.5", "generation.flow_shift=null"] if "motif" in preset else []
    pipeline.save_pretrained(tmp_path)
    if preset in FROM_IMAGE:
        given = given | {"image": Image.linear_gradient("L").resize((64, 64)).convert("RGB")}
        given["image"].save(tmp_path / "image.png")
        keys += [f"generation.image={tmp_path / 'image.png'}"]
    keys += [f"generation.num_frames={given['num_frames']}"] if "num_frames" in given else []
    plan = make_plan(read_config(f"configs/{preset}.yaml", [*SMALL, *options, *keys]))
    generation, sampler = plan.config.generation, Sampler(plan)
    if "flow_shift" in pipeline.scheduler.config:
        shifted = {"flow_shift": generation.flow_shift}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **shifted)
    frames, run = sampler.sample_video(sampler.load(), generation.prompt, {})
    expected = pipeline(
        prompt=[generation.prompt],
        negative_prompt=generation.negative_prompt,
        **{name: getattr(generation, name) for name in ("height", "width", "num_frames")} | given,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 3


def test_kandinsky_with_nabla_keeps_its_tiles_of_tokens(tmp_path):
    """Its sizes are multiples of 128 pixels, a tile of 8 x 8 tokens."""
    window = {"attention_wT": 3, "attention_wW": 3, "attention_wH": 3, "attention_add_sta": True}
    nabla = {"attention_type": "nabla", "attention_P": 0.9, "attention_method": "topcdf"} | window
    kandinsky5_pipeline(**nabla).save_pretrained(tmp_path)
    keys = [*SMALL, "generation.num_frames=9", "generation.height=128", "generation.width=256"]
    plan = make_plan(read_config("configs/kandinsky5_t2v_lite.yaml", [*keys, f"model.path={tmp_path}"]))
    assert plan.grid == TokenGrid(3, 8, 16, order="tiles") and plan.model.size_factor(2) == 128
    sampler = Sampler(plan)
    _, run = sampler.sample_video(sampler.load(), plan.config.generation.prompt, {})
    assert run["attention"]["grid"] == [3, 8, 16]
    assert run["attention"]["density"] == pytest.approx(plan.density)
    assert run["attention"]["check"]["worst"]["relative_l2"] < 1e-5
