"""Trains the VAE of a bundled model from nothing: frames, then clips, then clips with outlines stressed."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.toyworld.train.loop import Stage
from scripts.toyworld.train.model import CONV_GAIN
from scripts.toyworld.train.options import (
    FAMILIES,
    Options,
    draw_mosaic,
    draw_video,
    generator,
    mixed_precision,
    run,
)


def vae_loss(
    vae: nn.Module, options: Options, *, stage: int, frames: int, batch: int, edges: float = 0.0
) -> Callable[[int], Tensor]:
    """Reconstruction (L1 + L2) and a small Kullback-Leibler term that keeps the latents smooth.

    `edges`: how much more an error on the outline of a shape weighs than one far from it. Where nothing is
    stressed, a family that normalises over whole frames sees mosaics: on one shape before a flat ground, its
    layers have the ground for their statistics, and learn the shape's colour last.
    """
    family = FAMILIES[options.family]
    chunk_step = family.frames_step if frames > 1 and family.chunked else None

    def draw(random: torch.Generator) -> Tensor:
        mosaic = family.mosaic and edges == 0
        return draw_mosaic(options, frames, random) if mosaic else draw_video(options, frames, random)[0]

    def loss(step: int) -> Tensor:
        random = generator(options, stage, step)
        video = torch.stack([draw(random) for _ in range(batch)]).to(options.device)
        weight = 1 + edges * outline(video)
        with mixed_precision(options):
            posterior = vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(options.device)
            parts = reconstruct(vae, posterior.mean + posterior.std * noise, video, weight, chunk_step)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        costs = [((error.abs() + error.square()) * weight).mean() for error, weight in parts]
        return sum(costs) / len(costs) + 1e-4 * divergence

    return loss


def reconstruct(
    vae: nn.Module, latents: Tensor, video: Tensor, weight: Tensor, chunk_step: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Errors of the decoded videos and the weights beside them.

    `chunk_step`, frames to a latent frame: half of the videos are decoded from the second latent frame on,
    without the first frame that comes of it, as a pipeline does that decodes in chunks.
    """
    if chunk_step is None:
        return [(vae.decode(latents).sample - video, weight)]
    half, lost = len(video) // 2, video.shape[2] - chunk_step * (latents.shape[2] - 2)
    later = vae.decode(latents[half:, :, 1:]).sample[:, :, 1:] - video[half:, :, lost:]
    return [
        *reconstruct(vae, latents[:half], video[:half], weight[:half], None),
        (later, weight[half:, :, lost:]),
    ]


def outline(video: Tensor) -> Tensor:
    """Near 1 within two pixels of a strong edge, 0 where nothing changes; of `[B, 3, F, H, W]`."""
    blurred = F.avg_pool3d(video, (1, 5, 5), stride=1, padding=(0, 2, 2), count_include_pad=False)
    return (4 * (video - blurred).abs().amax(dim=1, keepdim=True)).clamp(max=1)


def initialise_vae(vae: nn.Module) -> None:
    """Starts as an image model with a strong signal: in the default scale the biases of a deep, narrow
    network drown its input, and hundreds of steps pass before anything but the background is learnt.
    """
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
                weight = layer.weight
                gain = 1.0 if isinstance(layer, nn.Linear) else CONV_GAIN
                scale = gain / math.sqrt(weight[0, :, 0].numel() if weight.ndim == 5 else weight[0].numel())
                newest = (
                    weight[:, :, -1] if weight.ndim == 5 else weight
                )  # causal: the last tap is the present
                weight.zero_()
                newest.normal_(std=scale)
                if layer.bias is not None:
                    layer.bias.zero_()
        for name, layer in vae.named_modules():
            if name.endswith("time_conv"):  # begins as the identity: a still video
                layer.weight.zero_()
                identity = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
                layer.weight[:, :, -1, 0, 0] = identity


def train_vae(options: Options) -> nn.Module:
    """Single frames first, which is cheap, then short clips: the VAE is causal.

    At the end outlines count more: most pixels are background, and corners are what tells the shapes apart.
    """
    torch.manual_seed(options.seed)
    family = FAMILIES[options.family]
    vae = family.build_vae()
    initialise_vae(vae)
    family.quieten(vae)
    vae.to(options.device)
    loss = vae_loss(vae, options, stage=1, frames=1, batch=8)
    vae = run(Stage("vae_images", vae, loss, options.image_steps, 3e-3, 0.99), options)
    loss = vae_loss(vae, options, stage=2, frames=family.clip_frames, batch=4)
    vae = run(Stage("vae_clips", vae, loss, options.vae_steps, 2e-3, 0.99), options)
    loss = vae_loss(vae, options, stage=5, frames=family.clip_frames, batch=4, edges=8)
    outlines = Stage("vae_outlines", vae, loss, options.outline_steps, 1e-3, 0.99)
    return run(outlines, options).requires_grad_(False).eval()
