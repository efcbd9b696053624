"""Forks the self-attention of WanTransformer3DModel: video tokens only."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, _get_qkv_projections

from radial_attn import TokenGrid

from .runtime.layer_attention import attend
from .runtime.output_check import LayerCheck, watched

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
    sizes = arguments["hidden_states"].shape[2:]
    return TokenGrid(
        *(size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True))
    )


class RadialProcessor(WanAttnProcessor):
    """Computes self-attention by `radial_attention`, or by upstream if layer or call is dense."""

    def __init__(self, dense: bool, layer_check: LayerCheck | None = None) -> None:
        super().__init__()
        self.dense, self.layer_check = dense, layer_check

    @watched
    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple | None = None,
    ) -> torch.Tensor:
        """Returns `[B, S, C]`; `rotary_emb` holds cos and sin `[1, S, 1, D]` and two `AttentionCall`s."""
        *rotary, radial_call, dense_call = rotary_emb
        call = dense_call if self.dense else radial_call
        if call is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        if attention_mask is not None:
            got = tuple(attention_mask.shape)
            raise ValueError(f"radial attention takes no attention_mask, got one of {got}; pass None")
        query, key, value = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        normed = attn.norm_q(query), attn.norm_k(key), value
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in normed)
        tables = [table[0, :, 0] for table in rotary]
        query, key = (apply_rotary_emb(x, tables, sequence_dim=1) for x in (query, key))
        output = attend(query, key, value, call, self).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](output))
