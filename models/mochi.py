"""Forks the joint attention of MochiTransformer3DModel over video tokens and text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0

from radial_attn import TokenGrid

from .runtime.processor import JointAttention

UPSTREAM_PROCESSOR = MochiAttnProcessor2_0
ROTARY_TOKENS = 0  # dimension of the tokens in the rotary tables
TIMESTEPS_RISE = True  # from 0, noise, to 1000


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[MochiAttention]:
    """Returns the attention modules in block order."""
    return [block.attn1 for block in transformer.transformer_blocks]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns a call's grid: latents `[B, C, frames, height, width]` over the patch size, and padded text."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, text = transformer.config.patch_size, arguments["encoder_hidden_states"].shape[1]
    return TokenGrid(frames, height // patch, width // patch, text)


def text_mask(arguments: dict[str, Any]) -> torch.Tensor:
    """Returns which text tokens are valid, `[B, T]`."""
    return arguments["encoder_attention_mask"]


def project(
    attn: MochiAttention, video: torch.Tensor, text: torch.Tensor, rotary: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns query, key and value `[B, S + T, H, D]` of video `[B, S, C]` and text `[B, T, C]`.

    Only the video is rotated.
    """
    layers = attn.to_q, attn.to_k, attn.to_v
    query, key, value = (layer(video).unflatten(2, (attn.heads, -1)) for layer in layers)
    video_heads = _rotate(attn.norm_q(query), *rotary), _rotate(attn.norm_k(key), *rotary), value
    layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    query, key, value = (layer(text).unflatten(2, (attn.heads, -1)) for layer in layers)
    text_heads = attn.norm_added_q(query), attn.norm_added_k(key), value
    return [torch.cat(pair, dim=1) for pair in zip(video_heads, text_heads, strict=True)]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates channels `2 i` and `2 i + 1` of `[B, S, H, D]` by the angle i of their head, `[S, H, D/2]`."""
    left, right = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((left * cos - right * sin, left * sin + right * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class RadialProcessor(JointAttention, MochiAttnProcessor2_0):
    """Puts `JointAttention` before the processor of Mochi.

    Upstream removes the padding by value, which breaks the graph of a compiled block; this does not.
    """

    project = staticmethod(project)
