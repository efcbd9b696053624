"""Forks the self-attention of CosmosTransformer3DModel: video tokens only.

Cross-attention with text and images stays upstream's, and so does the control net of Cosmos Transfer.
"""

from collections.abc import Sequence

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import Tensor

from .runtime.processor import SelfAttention
from .wan import token_grid  # noqa: F401 (a part of this fork too)

UPSTREAM_PROCESSOR = CosmosAttnProcessor2_0
ROTARY_TOKENS = 0  # dimension of the tokens in the rotary tables
STEPS_BY_INDEX = True  # calls get noise levels; those of two steps can be equal in bfloat16
TOKEN_ARGUMENTS = ("extra_pos_emb", "embedded_timestep", "temb", "controlnet_residual")  # if [B, N, C]


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[Attention]:
    """Returns the self-attention modules in block order."""
    return [block.attn1 for block in transformer.transformer_blocks]


def project(attn: Attention, hidden_states: Tensor, rotary: Sequence[Tensor]) -> list[Tensor]:
    """Returns query, key and value `[B, S, H, D]`; `rotary` are cos and sin `[S, D]`."""
    layers = attn.to_q, attn.to_k, attn.to_v
    query, key, value = (layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in layers)
    turned = (
        apply_rotary_emb(x, rotary, use_real_unbind_dim=-2, sequence_dim=1)
        for x in (attn.norm_q(query), attn.norm_k(key))
    )
    return [*turned, value]


class RadialProcessor(SelfAttention, CosmosAttnProcessor2_0):
    """Puts `SelfAttention` before the processor of Cosmos, whose attention gives its arguments by name."""

    project = staticmethod(project)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Sequence = (),
    ) -> Tensor:
        """Returns `[B, S, C]`, as `SelfAttention` does."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
