"""Defines the options of the trainer of the bundled models, and draws its videos."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.toyworld import all_attributes, random_scene, render
from scripts.toyworld.render import Scene
from scripts.toyworld.train import hunyuan_video, mochi, wan, wan_i2v
from scripts.toyworld.train.loop import Stage, run_stage
from scripts.toyworld.train.model import Family

FAMILIES: dict[str, Family] = {
    "wan": wan.FAMILY,
    "hunyuan_video": hunyuan_video.FAMILY,
    "mochi": mochi.FAMILY,
    "wan_i2v": wan_i2v.FAMILY,
}


@dataclass(frozen=True)
class Options:
    """Holds what the command line can set (`--name value`)."""

    family: str = "wan"
    out: Path = Path("outputs/wan-tiny")
    start: Path | None = None  # a model to start from; its VAE is not trained
    work: Path = Path("outputs/train_wan_tiny")
    device: str = "cpu"  # on the command line: CUDA if there is one
    seed: int = 0
    image_steps: int = 1500
    vae_steps: int = 1500
    outline_steps: int = 1200
    videos: int = 3000
    steps: int = 5200
    rate: float = 2e-3  # learning rate of the transformer
    shift: float = 5.0  # of the noise levels in training; high ones decide the motion
    batch: int = 8
    frames: int = 33
    size: int = 64
    save_every: int = 100
    compile: bool = False  # the transformer's blocks; on the command line: if torch.compile works


def generator(options: Options, stage: int, step: int) -> torch.Generator:
    """Makes the generator of one step's random numbers."""
    return torch.Generator().manual_seed((options.seed * 10 + stage) * 10_000_000 + step)


def mixed_precision(options: Options) -> torch.autocast:
    """Computes matrix products and convolutions in bfloat16; weights and losses stay in float32."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16)


def run(stage: Stage, options: Options) -> nn.Module:
    """Trains one stage in the work folder; returns the averaged model."""
    return run_stage(stage, options.work, options.device, options.save_every)


def render_scene(scene: Scene, frames: int, size: int) -> Tensor:
    """Renders a scene as the VAE takes it: `[3, frames, size, size]` in [-1, 1]."""
    return render(scene, frames, size, size).permute(3, 0, 1, 2) * 2 - 1


def draw_scene(random: torch.Generator) -> Scene:
    """Draws a scene with random attributes."""
    combinations = all_attributes()
    attributes = combinations[int(torch.randint(len(combinations), (), generator=random))]
    return random_scene(attributes, random)


def draw_mosaic(options: Options, frames: int, random: torch.Generator) -> Tensor:
    """Puts together quarters of four videos, each around its shape: `[3, frames, size, size]` in [-1, 1].

    It has four backgrounds, and a fifth of it is shapes; a video has one, and a twentieth.
    """
    quarters = [_quarter(options.size, frames, random) for _ in range(4)]
    return torch.cat([torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)], dim=2)


def _quarter(size: int, frames: int, random: torch.Generator) -> Tensor:
    """Cuts `[3, frames, size / 2, size / 2]` out of a random video, around the shape in its first frame."""
    scene, half = draw_scene(random), size // 2
    video = render_scene(scene, frames, size)
    for dim, centre in zip((3, 2), scene.position(torch.zeros(())), strict=True):
        shift = int(torch.randint(-half // 5, half // 5 + 1, (), generator=random))
        first = int(size * (centre + 0.5)) - half // 2 + shift
        video = video.narrow(dim, min(max(first, 0), size - half), half)
    return video
