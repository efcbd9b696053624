"""Forks AnyFlowTransformer3DModel, a relative of Wan with two timesteps and frames before channels."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow import (
    AnyFlowAttention,
    AnyFlowAttnProcessor,
    apply_rotary_emb,
)
from torch import Tensor

from radial_attn import TokenGrid

from .runtime.processor import SelfAttention
from .wan import attention_layers, latent_grid, stacks

__all__ = [
    "ROTARY_TOKENS",
    "UPSTREAM_PROCESSOR",
    "RadialProcessor",
    "attention_layers",
    "stacks",
    "token_grid",
]
UPSTREAM_PROCESSOR = AnyFlowAttnProcessor
ROTARY_TOKENS = 2  # dimension of the tokens in the rotary tables


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns a call's grid: latents `[B, frames, C, height, width]` over the patch size."""
    frames, _, *sizes = arguments["hidden_states"].shape[1:]
    return latent_grid((frames, *sizes), transformer.config.patch_size)


def project(attn: AnyFlowAttention, hidden_states: Tensor, rotary: Sequence[Tensor]) -> list[Tensor]:
    """Returns query, key and value `[B, S, H, D]`; `rotary` are complex `[1, 1, S, D/2]` of query and key."""
    query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
    *heads, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
    turned = zip(heads, rotary, strict=True)
    return [*(apply_rotary_emb(x, table.transpose(1, 2)) for x, table in turned), value]


class _NamedTables(AnyFlowAttnProcessor):
    """Gives upstream's processor the rotary tables by name."""

    def __call__(self, *args: Any) -> Tensor:
        """Returns `[B, S, C]`; the last argument is the tables of query and key."""
        *others, rotary = args
        return super().__call__(*others, dict(zip(("query", "key"), rotary, strict=True)))


class RadialProcessor(SelfAttention, _NamedTables):
    """Puts `SelfAttention` before the processor of AnyFlow."""

    project = staticmethod(project)
