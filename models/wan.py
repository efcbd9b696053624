"""Forks the self-attention of WanTransformer3DModel: video tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, _get_qkv_projections
from torch import Tensor

from radial_attn import TokenGrid

from .runtime.processor import SelfAttention

UPSTREAM_PROCESSOR = WanAttnProcessor
ROTARY_TOKENS = 1  # dimension of the tokens in the rotary tables


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.blocks]


def attention_layers(transformer: torch.nn.Module) -> list[WanAttention]:
    """Returns the self-attention modules in block order."""
    return [block.attn1 for block in transformer.blocks]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns a call's grid: latents `[B, C, frames, height, width]` over the patch size, rounded down."""
    return latent_grid(arguments["hidden_states"].shape[2:], transformer.config.patch_size)


def latent_grid(sizes: Sequence[int], patches: Sequence[int]) -> TokenGrid:
    """Returns the grid of latents: frames, height and width over those of a patch, rounded down."""
    return TokenGrid(*(size // patch for size, patch in zip(sizes, patches, strict=True)))


def project(attn: WanAttention, hidden_states: Tensor, rotary: Sequence[Tensor]) -> list[Tensor]:
    """Returns query, key and value `[B, S, H, D]`; `rotary` are cos and sin `[1, S, 1, D]`."""
    query, key, value = _get_qkv_projections(attn, hidden_states, None)
    normed = attn.norm_q(query), attn.norm_k(key), value
    *rotated, value = (x.unflatten(2, (attn.heads, -1)) for x in normed)
    tables = [table[0, :, 0] for table in rotary]
    return [*(apply_rotary_emb(x, tables, sequence_dim=1) for x in rotated), value]


class RadialProcessor(SelfAttention, WanAttnProcessor):
    """Puts `SelfAttention` before the processor of Wan."""

    project = staticmethod(project)
