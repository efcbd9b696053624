"""Forks the joint attention of MochiTransformer3DModel over video tokens and text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0

from radial_attn import TokenGrid

from .runtime.layer_attention import attend
from .runtime.output_check import LayerCheck, watched

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


class RadialProcessor(MochiAttnProcessor2_0):
    """Computes joint attention by `radial_attention`, or by upstream if layer or call is dense.

    Upstream removes the padding by value, which breaks the graph of a compiled block; this does not.
    """

    def __init__(self, dense: bool, layer_check: LayerCheck | None = None) -> None:
        super().__init__()
        self.dense, self.layer_check = dense, layer_check

    @watched
    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `[B, S, C]` and `[B, T, C]`; `image_rotary_emb`: cos, sin `[S, H, D/2]` and two calls."""
        *rotary, radial_call, dense_call = image_rotary_emb
        call = dense_call if self.dense else radial_call
        if call is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        streams = project(attn, hidden_states, encoder_hidden_states, rotary)
        output = attend(*streams, call, self).flatten(2, 3)
        video, text = output.tensor_split((hidden_states.shape[1],), dim=1)
        video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.context_pre_only else attn.to_add_out(text)


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
