"""Pipelines of several families through the command, tiny and random."""

import json

import numpy as np
import pytest
import torch

from scripts.generate import main
from scripts.run.config import read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from tests.support.script_cases import SMALL
from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import hunyuan15_pipeline, hunyuan_pipeline
from tests.support.tiny_ltx import ltx_pipeline
from tests.support.tiny_mochi import mochi_pipeline
from tests.support.tiny_motif import motif_pipeline

RUNS = {
    "hunyuan_t2v": (hunyuan_pipeline, ["generation.num_frames=9", "generation.prompt_template=plain"]),
    "hunyuan15_t2v": (hunyuan15_pipeline, ["generation.num_frames=9"]),
    "ltx_t2v": (ltx_pipeline, ["generation.num_frames=5", "generation.height=32"]),
    "mochi_t2v": (mochi_pipeline, ["generation.num_frames=7"]),
    "motif_t2v": (motif_pipeline, ["generation.num_frames=9"]),
    "wan2.2_t2v_a14b": (lambda: wan_pipeline(experts=2), ["generation.num_frames=9"]),
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
    [("ltx_t2v", {"guidance_scale": 3.0, "frame_rate": 25}), ("hunyuan15_t2v", {}), ("motif_t2v", {})],
)
def test_a_dense_run_is_that_of_diffusers(preset, given, tmp_path):
    """Calls the pipeline by its own arguments; guidance of two is in their guider, 6 and 7.5."""
    build, options = RUNS[preset]
    pipeline, keys = build(), [f"model.path={tmp_path}", "attention.pattern=dense", "attention.check=off"]
    keys += ["generation.guidance_scale=7.5", "generation.flow_shift=null"] if preset == "motif_t2v" else []
    pipeline.save_pretrained(tmp_path)
    plan = make_plan(read_config(f"configs/{preset}.yaml", [*SMALL, *options, *keys]))
    generation, sampler = plan.config.generation, Sampler(plan)
    frames, run = sampler.sample_video(sampler.load(), generation.prompt, {})
    expected = pipeline(
        prompt=[generation.prompt],
        negative_prompt=generation.negative_prompt,
        **{name: getattr(generation, name) for name in ("height", "width", "num_frames")},
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **given,
    ).frames[0]
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))
    assert list(run["attention"]["calls"]) == ["dense"] and len(run["step_seconds"]) == 3
