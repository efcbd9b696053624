"""Forks the self-attention of LTXVideoTransformer3DModel: video tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    apply_rotary_emb,
)

from radial_attn import TokenGrid

from .runtime.layer_attention import attend
from .runtime.output_check import LayerCheck, watched

UPSTREAM_PROCESSOR = LTXVideoAttnProcessor
ROTARY_TOKENS = 1  # dimension of the tokens in the rotary tables


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
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
        places = coordinates[0].reshape(*coordinates.shape[1:3], -1)[..., -1]  # LTX-2: start and end of each
        sizes = [len(axis.unique()) for axis in places]
    grid = TokenGrid(*sizes)
    if grid.tokens != tokens:
        raise ValueError(
            f"radial attention of LTX needs the tokens of a video alone: got {tokens} for {grid}; "
            "leave the conditions out"
        )
    return grid


class RadialProcessor(LTXVideoAttnProcessor):
    """Computes self-attention by `radial_attention`, or by upstream if layer or call is dense."""

    def __init__(self, dense: bool, layer_check: LayerCheck | None = None) -> None:
        super().__init__()
        self.dense, self.layer_check = dense, layer_check

    @watched
    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> torch.Tensor:
        """Returns `[B, S, C]`; `image_rotary_emb` holds cos and sin `[B, S, C]` and two `AttentionCall`s."""
        *rotary, radial_call, dense_call = image_rotary_emb
        call = dense_call if self.dense else radial_call
        if call is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        if attention_mask is not None:
            got = tuple(attention_mask.shape)
            raise ValueError(f"radial attention takes no attention_mask, got one of {got}; pass None")
        query = apply_rotary_emb(attn.norm_q(attn.to_q(hidden_states)), rotary)
        key = apply_rotary_emb(attn.norm_k(attn.to_k(hidden_states)), rotary)
        tensors = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        output = attend(*tensors, call, self).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](output))
