"""Forks the self-attention of LTXVideoTransformer3DModel: video tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    apply_rotary_emb,
)
from torch import Tensor

from radial_attn import TokenGrid

from .runtime.processor import SelfAttention

UPSTREAM_PROCESSOR = LTXVideoAttnProcessor
ROTARY_TOKENS = 1  # dimension of the tokens in the rotary tables


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[LTXAttention]:
    """Returns the self-attention modules in block order."""
    return [block.attn1 for block in transformer.transformer_blocks]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns the grid of a call from its packed tokens, `[B, S, C]`, and its arguments for the sizes.

    Raises ValueError if tokens of conditions come before the video's.
    """
    tokens, coordinates = arguments["hidden_states"].shape[1], arguments.get("video_coords")
    if coordinates is None:
        sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    else:
        sizes = [len(axis.unique()) for axis in coordinates[0]]
    grid = TokenGrid(*sizes)
    if grid.tokens != tokens:
        raise ValueError(
            f"radial attention of LTX needs the tokens of a video alone: got {tokens} for {grid}; "
            "leave the conditions out"
        )
    return grid


def project(attn: LTXAttention, hidden_states: Tensor, rotary: Sequence[Tensor]) -> list[Tensor]:
    """Returns query, key and value `[B, S, H, D]`; `rotary` are cos and sin `[B, S, C]`."""
    query = apply_rotary_emb(attn.norm_q(attn.to_q(hidden_states)), rotary)
    key = apply_rotary_emb(attn.norm_k(attn.to_k(hidden_states)), rotary)
    return [x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states))]


class RadialProcessor(SelfAttention, LTXVideoAttnProcessor):
    """Puts `SelfAttention` before the processor of LTX-Video."""

    project = staticmethod(project)
