"""A tiny random LTX-Video: transformer, arguments of a call, pipeline."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.support.tiny import HEADS, TEXT_DIM, first, randoms, seeded, t5_pipeline

CHANNELS = 8
SETTINGS = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "cross_attention_dim": 24,
    "num_layers": 4,
    "caption_channels": TEXT_DIM,
}


def ltx_transformer(seed: int = 0, **changes: object) -> LTXVideoTransformer3DModel:
    """Makes a random LTX transformer in eval mode: 4 layers, 2 heads of 12, unless changed."""
    return seeded(seed, LTXVideoTransformer3DModel, **SETTINGS | changes)


def ltx_inputs(
    frames: int = 6,
    height: int = 6,
    width: int = 8,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, object]:
    """Returns arguments of a call: latents `[batch, frames * height * width, 8]`, 7 text tokens, 5 valid."""
    make = randoms(seed)
    return {
        "hidden_states": make(batch, frames * height * width, CHANNELS),
        "encoder_hidden_states": make(batch, 7, TEXT_DIM),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": first(batch * [5], 7).float(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx_vae(seed: int = 0) -> AutoencoderKLLTXVideo:
    """Makes a random LTX VAE, 4 times smaller in space and time, in eval mode."""
    coder = {
        "block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
    }
    coder |= {f"decoder_{name}": value for name, value in coder.items()}
    return seeded(seed, AutoencoderKLLTXVideo, latent_channels=CHANNELS, patch_size=1, **coder)


def ltx_pipeline(seed: int = 0, cls: type = LTXPipeline, **changes: object) -> DiffusionPipeline:
    """Makes a random LTXPipeline, or another `cls`, with all parts; `changes` go to its transformer."""
    parts = {"vae": ltx_vae(seed), "transformer": ltx_transformer(seed, **changes)}
    dynamic = {"base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **dynamic)
    return t5_pipeline(cls, seed, scheduler=scheduler, **parts)


def ltx_image_pipeline(seed: int = 0) -> DiffusionPipeline:
    """Makes a random LTXImageToVideoPipeline, whose tokens of the image have a timestep of their own."""
    return ltx_pipeline(seed, LTXImageToVideoPipeline)
