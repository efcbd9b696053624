"""Puts radial attention before upstream's processor: the class of a fork is one of these, then upstream's.

A fork adds `project`, a static method that returns query, key and value `[B, S, H, D]`, normed and rotated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .layer_attention import AttentionCall, attend
from .output_check import LayerCheck, watched


class _Processor:
    """Holds what every layer has; `rotary` ends with the calls of radial and of always dense layers."""

    project: Callable[..., Sequence[Tensor]]

    def __init__(self, dense: bool, layer_check: LayerCheck | None = None) -> None:
        super().__init__()
        self.dense, self.layer_check = dense, layer_check

    def _split(self, rotary: Sequence[Any]) -> tuple[Any, AttentionCall | None]:
        """Returns the rotary tables, as upstream made them, and how this layer attends, None for upstream."""
        *tables, radial_call, dense_call = rotary
        return tables, dense_call if self.dense else radial_call


class SelfAttention(_Processor):
    """Computes self-attention of video tokens by `radial_attention`, or by upstream.

    A fork adds `project(attn, hidden_states, rotary)`.
    """

    @watched
    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Sequence[Any] = (),
    ) -> Tensor:
        """Returns `[B, S, C]`; `rotary_emb` holds the rotary tables and two `AttentionCall`s."""
        rotary, call = self._split(rotary_emb)
        if call is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        if attention_mask is not None:
            got = tuple(attention_mask.shape)
            raise ValueError(f"radial attention takes no attention_mask, got one of {got}; pass None")
        output = attend(*self.project(attn, hidden_states, rotary), call, self).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](output))


class JointAttention(_Processor):
    """Computes joint attention of video tokens, then text, by `radial_attention`, or by upstream.

    A fork adds `project(attn, video, text, rotary)`, for `[B, N, C]` and `[B, T, C]`.
    """

    @watched
    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Sequence[Any] = (),
    ) -> tuple[Tensor, Tensor]:
        """Returns video `[B, N, C]` and text `[B, T, C]` after attention, from the same shapes.

        `image_rotary_emb` holds the rotary tables and two `AttentionCall`s, whose text lengths replace
        `attention_mask`.
        """
        rotary, call = self._split(image_rotary_emb)
        shared = getattr(self, "_parallel_config", None) is not None  # by diffusers' own parallelism
        if call is None or (call.backend == "dense" and shared):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        streams = self.project(attn, hidden_states, encoder_hidden_states, rotary)
        output = attend(*streams, call, self).flatten(2, 3)
        video, text = output.tensor_split([hidden_states.shape[1]], dim=1)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        of_text = getattr(attn, "to_add_out", None)
        return video, text if of_text is None else of_text(text)
