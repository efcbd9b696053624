"""A tiny random MotifVideo: transformer, arguments of a call, pipelines."""

import string
from collections.abc import Sequence

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from transformers import GemmaTokenizer, SiglipImageProcessorPil, T5Gemma2Encoder, T5Gemma2EncoderConfig

from tests.support.tiny import CHANNELS, HEADS, TEXT_DIM, quiet, randoms, seeded, wan_vae
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


def gemma_tokenizer() -> GemmaTokenizer:
    """Makes a Gemma tokenizer of single letters, which pads on the left."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])


def t5_gemma(seed: int = 0) -> T5Gemma2Encoder:
    """Makes a random T5Gemma 2 encoder of one layer, whose vision tower makes 4 tokens of an image."""
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 32, "hidden_size": TEXT_DIM, "head_dim": 8, "num_key_value_heads": 1}
    vision = {"hidden_size": IMAGE_DIM, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = T5Gemma2EncoderConfig(
        text_config=sizes | text | {"dropout_rate": 0.0},
        vision_config=sizes | vision,
        mm_tokens_per_image=4,
        dropout_rate=0.0,
    )
    return seeded(seed, T5Gemma2Encoder, config)


def motif_pipeline(seed: int = 0, cls: type = MotifVideoPipeline, **changes: object) -> DiffusionPipeline:
    """Makes a random MotifVideoPipeline, or another `cls`; `changes` go to its transformer."""
    pipeline = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=wan_vae(seed),
        text_encoder=t5_gemma(seed),
        tokenizer=gemma_tokenizer(),
        transformer=motif_transformer(seed, **changes),
        guider=AdaptiveProjectedGuidance(adaptive_projected_guidance_rescale=12.0),
        feature_extractor=SiglipImageProcessorPil(size={"height": 28, "width": 28}),
    )
    return quiet(pipeline)


def motif_image_pipeline(seed: int = 0) -> DiffusionPipeline:
    """Makes a random MotifVideoImage2VideoPipeline."""
    return motif_pipeline(seed, MotifVideoImage2VideoPipeline)
