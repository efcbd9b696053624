"""The bundled LoRA for four times the length: small, and denoises longer videos better."""

import torch

from radial_attn.models.training.flow import encode_text, encode_video, predict_velocity, stack_text
from scripts.run.config import ROOT, read_config
from scripts.run.plan import make_plan
from scripts.run.sampler import Sampler
from scripts.toyworld import random_scene, render
from scripts.toyworld.accuracy import attention
from scripts.toyworld.render import Attributes

PRESET = "configs/wan_tiny_4x.yaml"
SCENES = (Attributes("red", "circle", "around", "navy"), Attributes("blue", "square", "vertically", "gray"))
LEVELS = (0.9, 0.6)


def loss(*words: str) -> float:
    """Returns the mean squared error of the velocity of toy world videos, with the preset's mask."""
    config = read_config(PRESET, ["model.device=cpu", *words])
    pipeline = Sampler(make_plan(config)).load()
    random, sizes = torch.Generator().manual_seed(0), config.generation
    scenes = [render(random_scene(a, random), sizes.num_frames, 64, 64) for a in SCENES]
    videos = encode_video(pipeline, torch.stack(scenes).permute(0, 4, 1, 2, 3) * 2 - 1)
    noise = torch.randn(videos.shape, generator=random)
    sigma = torch.tensor(LEVELS)
    mix = sigma[:, None, None, None, None]
    text = stack_text([encode_text(pipeline, "wan", a.caption) for a in SCENES])
    with torch.no_grad(), attention(pipeline, config) as handle:
        noisy = (1 - mix) * videos + mix * noise
        velocity = predict_velocity(pipeline.transformer, "wan", noisy, sigma, text)
        assert handle.report()["density"] < 0.3
    return (velocity - (noise - videos)).square().mean().item()


def test_is_small():
    (entry,) = read_config(PRESET, []).model.loras
    files = list((ROOT / entry.path).iterdir())
    assert sum(file.stat().st_size for file in files) <= 3_000_000


def test_denoises_longer_videos_better():
    """On the videos held out in training it has a quarter of the loss (results/length_extension_*.md)."""
    words = ["attention.dense_steps=0"]
    ratio = loss(*words) / loss(*words, "model.loras=null")
    assert 0.3 < ratio < 0.9, ratio
