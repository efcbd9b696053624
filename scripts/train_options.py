"""Options of the trainer of the bundled model, and what both of its parts share."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from scripts import tiny_hunyuan_video, tiny_mochi, tiny_wan, tiny_wan_i2v
from scripts.train_loop import Stage, run_stage
from toyworld import all_attributes, random_scene, render
from toyworld.render import Attributes

FAMILIES: dict[str, ModuleType] = {
    "wan": tiny_wan,
    "hunyuan_video": tiny_hunyuan_video,
    "mochi": tiny_mochi,
    "wan_i2v": tiny_wan_i2v,
}


@dataclass(frozen=True)
class Options:
    """What can be set from the command line (`--name value`)."""

    family: str = "wan"
    out: Path = Path("assets/wan-tiny")
    start: Path | None = None  # a model to go on from: its VAE stays as it is
    work: Path = Path("outputs/train_tiny")
    device: str = "cpu"  # on the command line: CUDA where there is one
    seed: int = 0
    image_steps: int = 1500
    vae_steps: int = 1500
    outline_steps: int = 1200
    videos: int = 3000
    steps: int = 5200
    rate: float = 2e-3  # learning rate of the transformer
    shift: float = 5.0  # of the noise levels in training; motion is decided at high ones
    batch: int = 8
    frames: int = 33
    size: int = 64
    save_every: int = 100
    compile: bool = False  # the transformer's blocks; on the command line: where there is a C++ compiler


def generator(options: Options, stage: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((options.seed * 10 + stage) * 10_000_000 + step)


def mixed_precision(options: Options) -> torch.autocast:
    """Matrix products and convolutions in bfloat16, weights and losses in float32."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16)


def run(stage: Stage, options: Options) -> nn.Module:
    """Trains one stage in the work folder; returns the averaged model."""
    return run_stage(stage, options.work, options.device, options.save_every)


def draw_video(options: Options, frames: int, random: torch.Generator) -> tuple[Tensor, Attributes]:
    """A random captioned video as the VAE takes it: `[3, frames, size, size]` in [-1, 1]."""
    combinations = all_attributes()
    attributes = combinations[int(torch.randint(len(combinations), (), generator=random))]
    video = render(random_scene(attributes, random), frames, options.size, options.size)
    return video.permute(3, 0, 1, 2) * 2 - 1, attributes
