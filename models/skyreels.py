"""Forks SkyReelsV2Transformer3DModel, a copy of Wan.

Diffusion forcing gives each frame a timestep of its own. The step of a call is that of its noisiest frame, so
dense steps end when the last frame is beyond them.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

from radial_attn import TokenGrid

from .runtime.processor import SelfAttention
from .wan import ROTARY_TOKENS, attention_layers, latent_grid, project, stacks

__all__ = [
    "ROTARY_TOKENS",
    "UPSTREAM_PROCESSOR",
    "RadialProcessor",
    "attention_layers",
    "stacks",
    "token_grid",
]
UPSTREAM_PROCESSOR = SkyReelsV2AttnProcessor


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns a call's grid; ValueError if a frame does not see the frames after its block."""
    if transformer.config.num_frame_per_block > 1:
        raise ValueError(
            "radial attention looks both ways in time, but this SkyReels-V2 attends in causal blocks of "
            f"{transformer.config.num_frame_per_block} frames; pass causal_block_size=1 to its pipeline"
        )
    return latent_grid(arguments["hidden_states"].shape[2:], transformer.config.patch_size)


class RadialProcessor(SelfAttention, SkyReelsV2AttnProcessor):
    """Puts `SelfAttention` before the processor of SkyReels-V2."""

    project = staticmethod(project)
