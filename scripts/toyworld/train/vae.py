"""Trains the VAE of a bundled model from scratch: frames, then clips, then clips with outlines weighted."""

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
    draw_scene,
    generator,
    mixed_precision,
    render_scene,
    run,
)


def vae_loss(
    vae: nn.Module, options: Options, *, stage: int, frames: int, batch: int, edges: float = 0.0
) -> Callable[[int], Tensor]:
    """Makes the loss of a step: L1 + L2 and a small Kullback-Leibler term that keeps the latents smooth.

    `edges`: how much more an error on the outline of a shape counts. At 0, a family that normalises over
    whole frames sees mosaics: with one shape on a flat background, the background makes up its statistics,
    and it learns the shape's colour last.
    """
    family = FAMILIES[options.family]
    chunk_step = family.frames_step if frames > 1 and family.chunked else None

    def draw(random: torch.Generator) -> Tensor:
        mosaic = family.mosaic and edges == 0
        if mosaic:
            return draw_mosaic(options, frames, random)
        return render_scene(draw_scene(random), frames, options.size)

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
    """Returns errors of the decoded videos, and their weights.

    If `chunk_step`, the frames of a latent frame, is given, half of the videos are decoded from the second
    latent frame on, and their first frame is dropped, as pipelines do that decode in chunks.
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
    """Returns about 1 within two pixels of a strong edge and 0 in flat areas, for `[B, 3, F, H, W]`."""
    blurred = F.avg_pool3d(video, (1, 5, 5), stride=1, padding=(0, 2, 2), count_include_pad=False)
    return (4 * (video - blurred).abs().amax(dim=1, keepdim=True)).clamp(max=1)


def initialise_vae(vae: nn.Module) -> None:
    """Starts as an image model with a strong signal.

    At the default scale, the biases of a deep, narrow network drown its input, and it learns nothing but the
    background for hundreds of steps.
    """
    with torch.no_grad():
        for layer in vae.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
                layer.weight.zero_()
                # a causal convolution over time begins with its last tap alone, the present
                present = layer.weight[:, :, -1] if layer.weight.ndim == 5 else layer.weight
                gain = 1.0 if isinstance(layer, nn.Linear) else CONV_GAIN
                present.normal_(std=gain / math.sqrt(present[0].numel()))
                if layer.bias is not None:
                    layer.bias.zero_()
        for name, layer in vae.named_modules():
            if name.endswith("time_conv"):  # begins as the identity: a still video
                layer.weight.zero_()
                identity = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
                layer.weight[:, :, -1, 0, 0] = identity


def train_vae(options: Options) -> nn.Module:
    """Trains on single frames first, which is cheap, then on short clips: the VAE is causal.

    At the end outlines count more: most pixels are background, and the shapes differ in their corners.
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
