"""The main job as a user runs it: shell script, bundled model, and the video that it makes."""

import json
import subprocess

import imageio
import numpy as np
import torch

from scripts.run.config import ROOT
from scripts.toyworld import parse_caption, read
from tests.support.auto_backend import AUTO

PROMPT = "a red circle moving around on a navy background"


def test_the_bundled_model_makes_the_video_that_the_prompt_asks_for(tmp_path):
    assert (ROOT / "assets/wan-tiny/model_index.json").is_file(), "assets/wan-tiny is missing"
    arguments = [
        "configs/wan_tiny.yaml",
        f"output.path={tmp_path / 'red.mp4'}",
        f"generation.prompt={PROMPT}",
    ]
    script = str(ROOT / "scripts/wan_t2v_inference.sh")
    result = subprocess.run(
        ["bash", script, *arguments], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "denoising: 100%" in result.stderr
    frames = np.stack(imageio.mimread(tmp_path / "red.mp4", memtest=False))
    assert frames.shape == (33, 64, 64, 3)
    assert all(read(torch.from_numpy(frames) / 255).matches(parse_caption(PROMPT)).values())
    record = json.loads((tmp_path / "red.json").read_text())
    assert record["config"]["attention"]["pattern"] == "radial"
    assert record["density"] <= 0.60 and record["attention"]["calls"][AUTO] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["red.json", "red.mp4"]
