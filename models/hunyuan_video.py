"""Forks the joint attention of HunyuanVideoTransformer3DModel: video tokens, then text.

Output rows of padded text are zeros. Upstream computes values there, but only such rows ever read them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from radial_attn import TokenGrid

from .runtime.processor import JointAttention

UPSTREAM_PROCESSOR = HunyuanVideoAttnProcessor2_0
ROTARY_TOKENS = 0  # dimension of the tokens in the rotary tables
DENSE_HAS_MASK = True  # upstream gives dense attention a mask; the fastest kernels take none


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [[*transformer.transformer_blocks, *transformer.single_transformer_blocks]]


def attention_layers(transformer: torch.nn.Module) -> list[Attention]:
    """Returns the joint attention modules, double blocks before single ones; the text refiner has none."""
    return [block.attn for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns the grid of a call, all text tokens included."""
    return joint_grid(transformer, arguments, ["encoder_hidden_states"])


def text_mask(arguments: dict[str, Any]) -> Tensor:
    """Returns which text tokens of a call are valid, `[B, T]`."""
    return arguments["encoder_attention_mask"]


def joint_grid(transformer: torch.nn.Module, arguments: dict[str, Any], texts: Sequence[str]) -> TokenGrid:
    """Returns the grid of latents `[B, C, frames, height, width]` over patches; `texts` name `[B, T, C]`."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    config = transformer.config
    text = sum(arguments[name].shape[1] for name in texts)
    return TokenGrid(
        frames // config.patch_size_t, height // config.patch_size, width // config.patch_size, text
    )


def project(attn: Attention, video: Tensor, text: Tensor, rotary: Sequence[Tensor]) -> list[Tensor]:
    """Returns query, key and value `[B, N + T, H, D]`, the first two normed, and rotated for the video."""
    layers = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
    added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k, None)
    *rotated, value = _heads(attn, video, *layers)
    rotated = [apply_rotary_emb(x, rotary, sequence_dim=1) for x in rotated]
    text_heads = _heads(attn, text, *(layers if attn.add_q_proj is None else added))
    return [torch.cat(pair, dim=1) for pair in zip((*rotated, value), text_heads, strict=True)]


def _heads(attn: Attention, tokens: Tensor, layers: Sequence, norms: Sequence) -> list[Tensor]:
    """Returns `[B, S, H, D]` of each layer, normed if there is a norm."""
    heads = [layer(tokens).unflatten(2, (attn.heads, -1)) for layer in layers]
    return [x if norm is None else norm(x) for x, norm in zip(heads, norms, strict=True)]


class RadialProcessor(JointAttention, HunyuanVideoAttnProcessor2_0):
    """Puts `JointAttention` before the processor of HunyuanVideo."""

    project = staticmethod(project)
