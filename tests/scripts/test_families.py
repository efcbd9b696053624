"""HunyuanVideo, Mochi and Wan2.2 through the command, with tiny random pipelines."""

import json

import pytest

from scripts.generate import main
from tests.support.script_cases import SMALL
from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import hunyuan_pipeline
from tests.support.tiny_ltx import ltx_pipeline
from tests.support.tiny_mochi import mochi_pipeline

RUNS = {
    "hunyuan_t2v": (hunyuan_pipeline, ["generation.num_frames=9", "generation.prompt_template=plain"]),
    "ltx_t2v": (ltx_pipeline, ["generation.num_frames=5", "generation.height=32"]),
    "mochi_t2v": (mochi_pipeline, ["generation.num_frames=7"]),
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
