"""Forks the joint attention of HunyuanVideo15Transformer3DModel: video tokens, then text.

The text consists of image, glyph and prompt tokens, which upstream sorts: the valid ones come first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor

from radial_attn import TokenGrid

from .hunyuan_video import joint_grid, project
from .runtime.processor import JointAttention

UPSTREAM_PROCESSOR = HunyuanVideo15AttnProcessor2_0
ROTARY_TOKENS = 0  # dimension of the tokens in the rotary tables
DENSE_HAS_MASK = True  # upstream gives dense attention a mask; the fastest kernels take none


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[Attention]:
    """Returns the joint attention modules in block order; the text refiner has none."""
    return [block.attn for block in transformer.transformer_blocks]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns the grid of a call, all text tokens included."""
    texts = ["image_embeds", "encoder_hidden_states_2", "encoder_hidden_states"]
    return joint_grid(transformer, arguments, texts)


def text_mask(arguments: dict[str, Any]) -> Tensor:
    """Returns which text tokens of a call are valid after sorting, `[B, T]`; an image of zeros has none."""
    image = arguments["image_embeds"]
    given = (image != 0).any().expand(image.shape[:2])
    masks = given, arguments["encoder_attention_mask_2"].bool(), arguments["encoder_attention_mask"].bool()
    valid = torch.cat(masks, dim=1)
    return torch.arange(valid.shape[1], device=valid.device) < valid.sum(dim=1, keepdim=True)


class RadialProcessor(JointAttention, HunyuanVideo15AttnProcessor2_0):
    """Puts `JointAttention` before the processor of HunyuanVideo 1.5."""

    project = staticmethod(project)
