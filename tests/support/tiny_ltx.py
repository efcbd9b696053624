"""A tiny random LTX-Video: transformer, arguments of a call, pipeline."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from tests.support.tiny import TEXT_DIM, assemble, t5_encoder

CHANNELS = 8


def ltx_transformer(seed: int = 0, **changes: object) -> LTXVideoTransformer3DModel:
    """A random LTX transformer in eval mode: 4 layers, 2 heads of 12, unless changed."""
    settings = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 4,
        "caption_channels": TEXT_DIM,
    }
    torch.manual_seed(seed)
    return LTXVideoTransformer3DModel(**(settings | changes)).eval()


def ltx_inputs(
    frames: int = 6,
    height: int = 6,
    width: int = 8,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, object]:
    """Arguments of a call: packed latents `[batch, frames * height * width, 8]`, 7 text tokens, 5 valid."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, frames * height * width, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT_DIM, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": (torch.arange(7) < 5).expand(batch, 7).float(),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def ltx_vae(seed: int = 0) -> AutoencoderKLLTXVideo:
    """A random LTX VAE, 4 times smaller in space and time, in eval mode."""
    torch.manual_seed(seed)
    scaling = (True, True, False, False)
    return AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        patch_size=1,
    ).eval()


def ltx_pipeline(seed: int = 0, **changes: object) -> LTXPipeline:
    """A random LTXPipeline with all parts; `changes` go to its transformer."""
    return assemble(
        LTXPipeline,
        seed,
        text_encoder=t5_encoder(seed),
        vae=ltx_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=ltx_transformer(seed, **changes),
    )
