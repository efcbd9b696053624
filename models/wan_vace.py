"""Forks WanVACETransformer3DModel: the Wan fork in its layers and its control layers."""

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_wan import WanAttention

from .wan import ROTARY_TOKENS, UPSTREAM_PROCESSOR, RadialProcessor, token_grid

__all__ = [
    "ROTARY_TOKENS",
    "UPSTREAM_PROCESSOR",
    "RadialProcessor",
    "attention_layers",
    "numbering",
    "stacks",
    "token_grid",
]


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the control blocks and the blocks; the video tokens go through each list from the start."""
    return [transformer.vace_blocks, transformer.blocks]


def attention_layers(transformer: torch.nn.Module) -> list[WanAttention]:
    """Returns the self-attention modules in the order in which they run: the control layers come first."""
    return [block.attn1 for block in (*transformer.vace_blocks, *transformer.blocks)]


def numbering(transformer: torch.nn.Module) -> list[tuple[int, str]]:
    """Returns number and name of each of `attention_layers`; a control layer counts as the layer it feeds."""
    fed = transformer.config.vace_layers
    control = [(layer, f"control layer {index}") for index, layer in enumerate(fed)]
    return control + [(layer, f"layer {layer}") for layer in range(len(transformer.blocks))]
