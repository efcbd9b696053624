"""A tiny random MotifVideo: transformer, arguments of a call."""

from collections.abc import Sequence

import torch
from diffusers import MotifVideoTransformer3DModel

from tests.support.tiny import CHANNELS, HEADS, TEXT_DIM, randoms, seeded
from tests.support.tiny_hunyuan import IMAGE, IMAGE_DIM, TEXT, hunyuan_inputs, with_own_norms

SETTINGS = {
    **HEADS,
    "in_channels": 2 * CHANNELS + 1,  # the latents of an image, and which frames it gives
    "out_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_decoder_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "image_embed_dim": IMAGE_DIM,
    "rope_axes_dim": (4, 4, 4),
    "enable_text_cross_attention_dual": True,
    "enable_text_cross_attention_single": True,
}


def motif_transformer(seed: int = 0, **changes: object) -> MotifVideoTransformer3DModel:
    """Makes a random transformer in eval mode: 2 double, 2 single and a decoder layer, 2 heads of 12."""
    transformer = with_own_norms(seeded(seed, MotifVideoTransformer3DModel, **SETTINGS | changes))
    with torch.no_grad():  # the layers before a decoder reach the output through its values alone
        single = transformer.single_transformer_blocks
        for block in single[len(single) - transformer.num_decoder_layers :]:
            block.attn.to_v.weight.mul_(8)
    return transformer


def motif_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    lengths: Sequence[int] = (TEXT,),
    **more: float,
) -> dict[str, torch.Tensor]:
    """Returns arguments of a call with 3 tokens of an image, a sample for each of `lengths`."""
    inputs = hunyuan_inputs(frames, height, width, lengths=lengths, channels=2 * CHANNELS + 1, **more)
    del inputs["pooled_projections"], inputs["guidance"]
    return inputs | {"image_embeds": randoms(1)(len(lengths), IMAGE, IMAGE_DIM)}
