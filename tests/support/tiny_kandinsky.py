"""A tiny random Kandinsky 5: transformer, arguments of a call, pipeline."""

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextModel

from tests.support.tiny import CHANNELS, TEXT_DIM, quiet, randoms, seeded
from tests.support.tiny_hunyuan import POOLED_DIM, clip, clip_tokenizer, hunyuan_vae, qwen_tokenizer, qwen_vl

SETTINGS = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": TEXT_DIM,
    "in_text_dim2": TEXT_DIM,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "axes_dims": (4, 4, 4),
}
SPARSE_PARAMS = {"sta_mask": None, "attention_type": "nabla", "to_fractal": True, "P": 0.9}


def kandinsky5_transformer(
    seed: int = 0, num_layers: int = 4, **changes: object
) -> Kandinsky5Transformer3DModel:
    """Makes a random Kandinsky 5 in eval mode: 4 visual layers, 2 heads of 12, unless changed.

    Modulations, zeros in a new model, are random: their gates let attention through, a little, because
    upstream rounds queries and keys to bfloat16 and so makes much of any other order of sums.
    """
    settings = SETTINGS | {"num_visual_blocks": num_layers} | changes
    transformer = seeded(seed, Kandinsky5Transformer3DModel, **settings)
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return transformer


def kandinsky5_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, object]:
    """Returns arguments of a call: latents `[batch, frames, height, width, 4]`, 7 text tokens."""
    make = randoms(seed)
    return {
        "hidden_states": make(batch, frames, height, width, CHANNELS),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": make(batch, 7, TEXT_DIM),
        "pooled_projections": make(batch, TEXT_DIM),
        "visual_rope_pos": [torch.arange(size) for size in (frames, height // 2, width // 2)],
        "text_rope_pos": torch.arange(7),
    }


def kandinsky5_pipeline(
    seed: int = 0, cls: type = Kandinsky5T2VPipeline, **changes: object
) -> DiffusionPipeline:
    """Makes a random pipeline of Kandinsky 5, or another `cls`; `changes` go to its transformer."""
    tokenizer = qwen_tokenizer()
    settings = {"in_text_dim2": POOLED_DIM, "visual_cond": True}
    pipeline = cls(
        transformer=kandinsky5_transformer(seed, **settings | changes),
        vae=hunyuan_vae(seed),
        text_encoder=qwen_vl(seed, 262),
        tokenizer=tokenizer,
        text_encoder_2=seeded(seed, CLIPTextModel, clip()),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    # The template must have 128 tokens or more, and the prompt must begin before the limit of 640.
    tokenizer.add_tokens(pipeline.prompt_template.split("\n")[:5])
    return quiet(pipeline)


def kandinsky5_image_pipeline(seed: int = 0) -> DiffusionPipeline:
    """Makes a random Kandinsky5I2VPipeline."""
    return kandinsky5_pipeline(seed, Kandinsky5I2VPipeline)
