"""Forks WanAnimateTransformer3DModel, a copy of Wan; its first frame is the reference image.

The face adapter, which reads the tokens of each frame between the blocks, is upstream's.
"""

from collections.abc import Iterable

import torch
from diffusers.models.transformers.transformer_wan_animate import WanAttnProcessor

from .runtime.processor import SelfAttention
from .wan import ROTARY_TOKENS, attention_layers, project, stacks, token_grid

__all__ = [
    "ROTARY_TOKENS",
    "UPSTREAM_PROCESSOR",
    "RadialProcessor",
    "attention_layers",
    "stacks",
    "token_grid",
]
UPSTREAM_PROCESSOR = WanAttnProcessor


def between_blocks(transformer: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """Returns the modules between the blocks whose first argument is all video tokens, as is their output."""
    return transformer.face_adapter


class RadialProcessor(SelfAttention, WanAttnProcessor):
    """Puts `SelfAttention` before the processor of Wan-Animate."""

    project = staticmethod(project)
