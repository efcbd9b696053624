"""Forks the self-attention of Kandinsky5Transformer3DModel's visual blocks: video tokens only.

A model with NABLA, sparse attention of its own, keeps its order of tokens, tiles of 8 x 8, but not its mask:
radial layers have the radial one, dense layers attend to everything.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention, Kandinsky5AttnProcessor

from radial_attn import TokenGrid

from .runtime.layer_attention import attend
from .runtime.output_check import LayerCheck, watched

UPSTREAM_PROCESSOR = Kandinsky5AttnProcessor


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.visual_transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[Kandinsky5Attention]:
    """Returns the self-attention modules of the visual blocks in order; the blocks of text stay."""
    return [block.self_attention for block in transformer.visual_transformer_blocks]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns a call's grid: latents `[B, frames, height, width, C]` over the patch size, in its order."""
    sizes = zip(arguments["hidden_states"].shape[1:4], transformer.config.patch_size, strict=True)
    order = "tiles" if _in_tiles(arguments) else "raster"
    return TokenGrid(*(size // patch for size, patch in sizes), order=order)


def with_calls(arguments: dict[str, Any], radial_call: Any, dense_call: Any) -> dict[str, Any]:
    """Returns the arguments of a call with two `AttentionCall`s, which take the place of NABLA's options."""
    given = {"to_fractal": _in_tiles(arguments), "calls": (radial_call, dense_call)}
    return arguments | {"sparse_params": given}


def _in_tiles(arguments: dict[str, Any]) -> bool:
    return bool((arguments.get("sparse_params") or {}).get("to_fractal"))


class RadialProcessor(Kandinsky5AttnProcessor):
    """Computes self-attention by `radial_attention`, or by upstream if layer or call is dense."""

    def __init__(self, dense: bool, layer_check: LayerCheck | None = None) -> None:
        super().__init__()
        self.dense, self.layer_check = dense, layer_check

    @watched
    def __call__(
        self,
        attn: Kandinsky5Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Returns `[B, S, C]`; `rotary_emb`: `[B, S, 1, D/2, 2, 2]`; `sparse_params`: of `with_calls`."""
        call = sparse_params["calls"][self.dense]
        if call is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, rotary_emb)
        layers = attn.to_query, attn.to_key, attn.to_value
        query, key, value = (layer(hidden_states).unflatten(2, (attn.num_heads, -1)) for layer in layers)
        query = _rotate(attn.query_norm(query.float()).type_as(query), rotary_emb)
        key = _rotate(attn.key_norm(key.float()).type_as(key), rotary_emb)
        return attn.out_layer(attend(query, key, value, call, self).flatten(2))


def _rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotates pairs of channels of `[B, S, H, D]`, rounded to bfloat16 as upstream does."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (rotary * pairs).sum(-1).flatten(-2).to(torch.bfloat16).type_as(x)
