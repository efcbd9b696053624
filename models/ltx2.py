"""Forks the video's self-attention of LTX2VideoTransformer3DModel; the audio and all else stay upstream's."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor

from .ltx import attention_layers, stacks, token_grid
from .runtime.layer_attention import attend
from .runtime.output_check import watched
from .runtime.processor import Processor

__all__ = ["RadialProcessor", "arrange", "attention_layers", "share", "stacks", "token_grid"]
UPSTREAM_PROCESSOR = upstream.LTX2AudioVideoAttnProcessor, upstream.LTX2PerturbedAttnProcessor
ROTARY_TOKENS = -2  # dimension of the tokens in the rotary tables, `[B, S, C]` or `[B, H, S, D / 2]`


def arrange(arguments: dict[str, Any], parallel: Any) -> dict[str, Any]:
    """Returns the arguments of a call, of a time a token (I2V) only those of this process."""
    times = arguments["timestep"]
    if parallel is None or times.ndim < 2 or times.shape[1] == 1:
        return arguments
    return arguments | {"timestep": parallel.shard(times, 1)}


def share(transformer: torch.nn.Module, parallel: Any) -> list[Any]:
    """Adds and returns hooks for several processes: all of the audio attends to all of the video."""

    def split(attention: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        tables = tuple(parallel.shard(table, ROTARY_TOKENS) for table in kwargs["query_rotary_emb"])
        return args, kwargs | {"query_rotary_emb": tables}

    def gather(attention: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return args, kwargs | {"encoder_hidden_states": parallel.gather(kwargs["encoder_hidden_states"])}

    places = [(block.audio_to_video_attn, split) for block in transformer.transformer_blocks]
    places += [(block.video_to_audio_attn, gather) for block in transformer.transformer_blocks]
    return [attention.register_forward_pre_hook(hook, with_kwargs=True) for attention, hook in places]


class RadialProcessor(Processor, upstream.LTX2PerturbedAttnProcessor):
    """Computes self-attention by `radial_attention`, or by upstream if layer or call is dense or skipped.

    Upstream's two processors differ in perturbation alone (STG), which replaces attention by the values.
    """

    @watched
    def __call__(  # noqa: PLR0917 (as upstream's)
        self,
        attn: upstream.LTX2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Sequence[Any] = (),
        key_rotary_emb: tuple | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        """Returns `[B, S, C]`; `query_rotary_emb` holds cos and sin and two `AttentionCall`s."""
        rotary, call = self._split(query_rotary_emb, attention_mask)
        if call is None or all_perturbed:
            perturbed = perturbation_mask, all_perturbed
            return super().__call__(attn, hidden_states, None, attention_mask, rotary, None, *perturbed)
        rotate = getattr(upstream, f"apply_{attn.rope_type}_rotary_emb")
        query = rotate(attn.norm_q(attn.to_q(hidden_states)), rotary)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)), rotary)
        tensors = [x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states))]
        output = attend(*tensors, call, self)
        if perturbation_mask is not None:  # `[B, 1, 1]`
            output = torch.lerp(tensors[2], output, perturbation_mask.unsqueeze(-1))
        if attn.to_gate_logits is not None:
            output = output * (2 * attn.to_gate_logits(hidden_states).sigmoid()).unsqueeze(-1)
        return attn.to_out[1](attn.to_out[0](output.flatten(2, 3)))
