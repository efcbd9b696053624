"""Forks ChronoEditTransformer3DModel, a copy of Wan whose video may shrink to two frames between steps."""

from diffusers.models.transformers.transformer_chronoedit import WanAttnProcessor

from .runtime.processor import SelfAttention
from .wan import ROTARY_TOKENS, attention_layers, project, stacks, token_grid

__all__ = [
    "ROTARY_TOKENS",
    "UPSTREAM_PROCESSOR",
    "RadialProcessor",
    "attention_layers",
    "stacks",
    "token_grid",
]
UPSTREAM_PROCESSOR = WanAttnProcessor


class RadialProcessor(SelfAttention, WanAttnProcessor):
    """Puts `SelfAttention` before the processor of ChronoEdit."""

    project = staticmethod(project)
