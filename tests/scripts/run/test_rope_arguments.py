"""Positions of a longer video from the configuration: lengths of the training, lines, records, refusals."""

import json
from inspect import signature

import pytest
from diffusers import MotifVideoTransformer3DModel

from scripts.generate import main
from scripts.run.hub_models import HUB_MODELS, read_model_info
from tests.support.rope_cases import REAL
from tests.support.tiny import wan_transformer


def test_architectures_know_the_rotary_embedding(tiny_model):
    assert read_model_info(str(tiny_model)).rope_time == (wan_transformer().rope.t_dim, 10000.0) == (4, 1e4)
    times = {name: model.rope_time for name, model in HUB_MODELS.items()}
    for name, time in times.items():
        wan = name.startswith("Wan") or any(
            relative in name for relative in ("SkyReels", "AnyFlow", "ChronoEdit")
        )
        family = "wan" if wan else "hunyuan_video" if "Hunyuan" in name or "Motif" in name else None
        assert time == (None if family is None else REAL[family][1:3])
    assert REAL["wan"][0]().rope.t_dim == 44
    rope = REAL["hunyuan_video"][0]().rope
    assert (rope.rope_dim[0], rope.theta) == (16, 256.0)
    motif = signature(MotifVideoTransformer3DModel).parameters
    assert (motif["rope_axes_dim"].default[0], motif["rope_theta"].default) == (16, 256.0)


def test_a_longer_video_through_the_command(tiny_model, tmp_path, capsys):
    size = ["generation.num_frames=33", "generation.height=32", "generation.width=32", "generation.steps=2"]
    argv = ["configs/wan_tiny.yaml", f"model.path={tiny_model}", "model.positions_frames=9", *size]
    line = (
        "\npositions: riflex, component 1 of 2 lowered to a period of 10.0: 9 latent frames, 3 in training\n"
    )
    videos = {}
    for method in ("plain", "riflex"):
        overrides = [f"model.positions={method}", f"output.path={tmp_path / method}.mp4"]
        assert main([*argv, *overrides]) == 0
        videos[method] = (tmp_path / f"{method}.mp4").read_bytes()
        record = json.loads((tmp_path / f"{method}.json").read_text())
        kept = record["config"]["model"]
        assert (kept["positions"], kept["positions_frames"]) == (method, 9)
        assert (line in capsys.readouterr().out) == (method == "riflex")
    assert videos["plain"] != videos["riflex"]
    assert main([*argv, "model.positions=riflex", "--dry-run"]) == 0 and line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "frames"),
    [
        ("wan2.1_t2v_14b", "18 latent frames, 21"),
        ("hunyuan_t2v_2x", "64 latent frames, 33"),
        ("mochi_t2v_2x", "56 latent frames, 28"),
        ("wan_tiny_4x", "33 latent frames, 9"),
        ("hunyuan_i2v", "33 latent frames, 33"),
        ("mochi_tiny", "6 latent frames, 6"),
    ],
)
def test_trained_lengths_of_the_families(preset, frames, capsys):
    assert main([f"configs/{preset}.yaml", "model.positions=yarn", "--dry-run"]) == 0
    assert f": {frames} in training" in capsys.readouterr().out
