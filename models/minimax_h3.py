"""Forks the self-attention of MiniMaxH3Transformer3DModel: one sequence of video, text, audio and conditions.

The rows of the video come first in every call that is not upstream's; all others count as text.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.transformers import transformer_minimax_h3 as upstream
from torch import Tensor

from radial_attn import TokenGrid

from .runtime.layer_attention import attend
from .runtime.output_check import watched
from .runtime.processor import Processor

UPSTREAM_PROCESSOR = upstream.MiniMaxH3AttnProcessor
ROTARY_TOKENS = 0  # dimension of the tokens in the rotary tables
TIMESTEPS_RISE = True  # from 0, noise, to 1


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through."""
    return [transformer.transformer_blocks]


def attention_layers(transformer: torch.nn.Module) -> list[upstream.MiniMaxH3Attention]:
    """Returns the attention modules in block order; the text refiner has none."""
    return [block.attn for block in transformer.transformer_blocks]


def video_rows(arguments: dict[str, Any]) -> Tensor:
    """Returns the rows of the video: the last unbroken run of `video_indices`; others are of conditions."""
    rows = arguments["video_indices"]
    breaks = (rows.diff() != 1).nonzero().flatten().tolist()
    return rows[breaks[-1] + 1 if breaks else 0 :]


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns the grid of a call by the places of its rows, `[S, 3]`, all other rows as text.

    Rows whose places are no grid count as one frame, so that every query sees all of them.
    """
    rows, places = video_rows(arguments), arguments["position_ids"]
    axes = [axis.unique() for axis in places[rows].T]
    sizes = [len(axis) for axis in axes]
    if math.prod(sizes) != len(rows) or not places[rows].equal(torch.cartesian_prod(*axes)):
        sizes = 1, 1, len(rows)
    return TokenGrid(*sizes, len(places) - len(rows))


def timestep(arguments: dict[str, Any]) -> Tensor:
    """Returns the timestep of the video, `[]`; audio and conditions have their own."""
    return arguments["timestep"][arguments["timestep_indices"][arguments["video_indices"][-1]]]


def working_dtype(transformer: torch.nn.Module) -> torch.dtype:
    """Returns the dtype of the blocks; the latents may have another."""
    return get_parameter_dtype(transformer.context_embedder)


def arrange(arguments: dict[str, Any], parallel: Any) -> dict[str, Any]:
    """Returns the arguments of a call with the rows of the video first; the outputs keep their order."""
    others = torch.ones_like(arguments["token_tags"])
    others[video_rows(arguments)] = 0
    order = others.argsort(stable=True)
    place = order.argsort()
    rows = {name: arguments[name][order] for name in ("timestep_indices", "token_tags", "position_ids")}
    places = {name: place[arguments[name]] for name in ("video_indices", "audio_indices", "text_indices")}
    return {**arguments, **rows, **places}


def share(transformer: torch.nn.Module, parallel: Any) -> list[Any]:
    """Adds and returns hooks for several processes: they split what goes by rows, and gather the audio."""

    def split(module: torch.nn.Module, args: tuple) -> tuple:
        return *args[:2], parallel.shard(args[2], 0), *args[3:]

    modules = (*transformer.transformer_blocks, transformer.norm_out)
    hooks = [module.register_forward_pre_hook(split) for module in modules]
    return [*hooks, transformer.audio_proj_out.register_forward_hook(lambda _, args, x: parallel.gather(x))]


class RadialProcessor(Processor, upstream.MiniMaxH3AttnProcessor):
    """Computes joint attention by `radial_attention`, or by upstream if layer or call is dense."""

    @watched
    def __call__(
        self,
        attn: upstream.MiniMaxH3Attention,
        hidden_states: Tensor,
        rotary_emb: Sequence[Any] = (),
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns `[B, S, C]`; `rotary_emb` holds cos and sin `[S, D]` and two `AttentionCall`s."""
        rotary, call = self._split(rotary_emb, attention_mask)
        if call is None:
            return super().__call__(attn, hidden_states, rotary, attention_mask)
        if attn.fused_projections:
            tensors = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            tensors = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in tensors)
        query, key = (upstream._apply_rotary_emb(x, *rotary) for x in (attn.norm_q(query), attn.norm_k(key)))
        output = attend(query, key, value, call, self).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](output))
