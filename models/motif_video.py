"""Forks the joint attention of MotifVideoTransformer3DModel: video tokens, then tokens of images and text.

Cross-attention stays upstream's. So do the decoder's layers, dense over two copies of the video: each takes
four times the products of another layer. Reports count them with cross-attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_motif_video import MotifVideoAttnProcessor2_0
from torch import Tensor

from radial_attn import TokenGrid

from .hunyuan_video import DENSE_HAS_MASK, ROTARY_TOKENS, joint_grid, project  # noqa: F401
from .runtime.processor import JointAttention

UPSTREAM_PROCESSOR = MotifVideoAttnProcessor2_0


def stacks(transformer: torch.nn.Module) -> list[Sequence[torch.nn.Module]]:
    """Returns the lists of blocks that the video tokens go through, without the decoder's."""
    single = transformer.single_transformer_blocks
    return [[*transformer.transformer_blocks, *single[: len(single) - transformer.num_decoder_layers]]]


def attention_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the joint attention modules, double blocks before single ones."""
    return [block.attn for block in stacks(transformer)[0]]


def rotated_layers(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the other attention modules that get rotary tables: cross-attention and the decoder's."""
    blocks = *transformer.transformer_blocks, *transformer.single_transformer_blocks
    crossed = [block.cross_attn for block in blocks if block.cross_attn is not None]
    return crossed + [block.attn for block in blocks[len(stacks(transformer)[0]) :]]


def check_parallel(transformer: torch.nn.Module) -> None:
    """Raises ValueError if several processes cannot share the tokens."""
    if count := transformer.num_decoder_layers:
        raise ValueError(f"{count} decoder layers of this MotifVideo need all tokens; run it in one process")


def token_grid(transformer: torch.nn.Module, arguments: dict[str, Any]) -> TokenGrid:
    """Returns the grid of a call, all tokens of images and text included."""
    texts = ("image_embeds", "encoder_hidden_states")
    return joint_grid(transformer, arguments, [x for x in texts if arguments.get(x) is not None])


def text_mask(arguments: dict[str, Any]) -> Tensor | None:
    """Returns which tokens of images and text are valid once `arrange` put those first, `[B, T]`."""
    mask, image = arguments.get("encoder_attention_mask"), arguments.get("image_embeds")
    if mask is None:
        return None
    first = mask.int().sort(dim=1, descending=True).values
    return first if image is None else torch.cat((first.new_ones(image.shape[:2]), first), dim=1)


def arrange(arguments: dict[str, Any], parallel: Any) -> dict[str, Any]:
    """Returns the arguments of a call with valid text first: Gemma's tokenizer pads on the left.

    Text has no positions in this transformer, so that its order changes nothing.
    """
    mask, text = arguments.get("encoder_attention_mask"), arguments["encoder_hidden_states"]
    if mask is None:
        return arguments
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    text, mask = text.take_along_dim(order.unsqueeze(2), 1), mask.take_along_dim(order, 1)
    return {**arguments, "encoder_hidden_states": text, "encoder_attention_mask": mask}


class RadialProcessor(JointAttention, MotifVideoAttnProcessor2_0):
    """Puts `JointAttention` before the processor of MotifVideo."""

    project = staticmethod(project)
