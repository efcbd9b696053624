"""Builds Wan's bundled image-to-video model, of Wan2.2's kind (without a CLIP).

Text encoder and VAE come from the bundled text-to-video model; four of its six layers are trained further.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline
from torch import Tensor

from scripts.toyworld.train import wan
from scripts.toyworld.train.model import mean_latents, normalise

KEPT = (0, 1, 4, 5)  # layers of the text-to-video model
CHANNELS = 16  # of a latent video; as many again hold the first frame
GIVEN = 4  # channels of the mask that says which frames are given


def encode(vae: torch.nn.Module, video: Tensor) -> Tensor:
    """Returns latents `[B, 32, F, H, W]`: those of videos `[B, 3, F, H, W]` and of their first frames."""
    alone = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], dim=2)
    return torch.cat([mean_latents(vae, video), mean_latents(vae, alone)], dim=1)


def normalise_both(latents: Tensor, vae: torch.nn.Module) -> Tensor:
    """Scales both halves of `[B, 32, F, H, W]` for the transformer."""
    return torch.cat([normalise(half, vae) for half in latents.chunk(2, dim=1)], dim=1)


class Denoiser(wan.Denoiser):
    """Holds text encoder and transformer of Wan with the first frame as input."""

    PIPELINE = WanImageToVideoPipeline
    TRANSFORMER: ClassVar[dict[str, int]] = {"in_channels": 2 * CHANNELS + GIVEN, "num_layers": len(KEPT)}

    def take_over(self, pipeline: DiffusionPipeline) -> None:
        """Loads the weights of a model of this kind, or of the bundled text-to-video model."""
        if pipeline.transformer.config.in_channels == CHANNELS:
            self.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
            self.transformer.load_state_dict(widened(pipeline.transformer))
        else:
            super().take_over(pipeline)

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicts the velocity `[B, 16, F, H, W]` from video and first frame, `[B, 32, F, H, W]`."""
        video, first = latents.chunk(2, dim=1)
        given = torch.zeros_like(video[:, :GIVEN])
        given[:, :, 0] = 1
        return super().forward(torch.cat([video, given, first], dim=1), sigma, captions)


def widened(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the weights of the kept layers, and a patch embedding that ignores the new channels."""
    weights = {name: x for name, x in transformer.state_dict().items() if not name.startswith("blocks.")}
    weights |= torch.nn.ModuleList(transformer.blocks[i] for i in KEPT).state_dict(prefix="blocks.")
    narrow = weights["patch_embedding.weight"]
    blind = narrow.new_zeros(len(narrow), CHANNELS + GIVEN, *narrow.shape[2:])
    return weights | {"patch_embedding.weight": torch.cat([narrow, blind], dim=1)}


FAMILY = replace(
    wan.FAMILY,
    denoiser=Denoiser,
    encode=encode,
    normalise=normalise_both,
    start=Path("assets/wan-tiny"),
    defaults={"steps": 1600, "rate": 1e-3, "videos": 2000},
)
