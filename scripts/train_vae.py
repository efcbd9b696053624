"""Trains the VAE of the bundled model from nothing: frames, then clips, then clips with outlines stressed."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.tiny_model import build_vae
from scripts.train_loop import Stage
from scripts.train_options import Options, draw_video, generator, mixed_precision, run


def vae_loss(
    vae: nn.Module, options: Options, *, stage: int, frames: int, batch: int, edges: float = 0.0
) -> Callable[[int], Tensor]:
    """Reconstruction (L1 + L2) and a small Kullback-Leibler term that keeps the latents smooth.

    `edges`: how much more an error on the outline of a shape weighs than one far from it.
    """

    def loss(step: int) -> Tensor:
        random = generator(options, stage, step)
        video = torch.stack([draw_video(options, frames, random)[0] for _ in range(batch)]).to(options.device)
        with mixed_precision(options):
            posterior = vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random).to(options.device)
            error = vae.decode(posterior.mean + posterior.std * noise).sample - video
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        weight = 1 + edges * outline(video)
        return ((error.abs() + error.square()) * weight).mean() + 1e-4 * divergence

    return loss


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
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                weight = layer.weight
                scale = 1.8 / math.sqrt(weight.shape[1] * weight.shape[-1] * weight.shape[-2])
                newest = (
                    weight[:, :, -1] if weight.ndim == 5 else weight
                )  # causal: the last tap is the present
                weight.zero_()
                newest.normal_(std=scale)
                layer.bias.zero_()
        for name, layer in vae.named_modules():
            if name.endswith("time_conv"):  # begins as the identity: a still video
                layer.weight.zero_()
                identity = torch.eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)
                layer.weight[:, :, -1, 0, 0] = identity
        vae.quant_conv.bias[vae.config.z_dim :] = -7.0  # log variance: little noise at first


def train_vae(options: Options) -> nn.Module:
    """Single frames first, which is cheap, then clips of nine frames: the VAE is causal and chunked.

    At the end outlines count more: most pixels are background, and corners are what tells the shapes apart.
    """
    torch.manual_seed(options.seed)
    vae = build_vae()
    initialise_vae(vae)
    vae.to(options.device)
    images = Stage(
        "vae_images", vae, vae_loss(vae, options, stage=1, frames=1, batch=8), options.image_steps, 3e-3, 0.99
    )
    vae = run(images, options)
    clips = Stage(
        "vae_clips", vae, vae_loss(vae, options, stage=2, frames=9, batch=4), options.vae_steps, 2e-3, 0.99
    )
    vae = run(clips, options)
    loss = vae_loss(vae, options, stage=5, frames=9, batch=4, edges=8)
    outlines = Stage("vae_outlines", vae, loss, options.outline_steps, 1e-3, 0.99)
    return run(outlines, options).requires_grad_(False).eval()
