"""A tiny random Mochi: transformer, arguments of a call, pipeline."""

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from tests.support.tiny import HEADS, TEXT_DIM, first, randoms, seeded, t5_pipeline

CHANNELS = 12  # the pipeline's statistics of the latents are for 12
SETTINGS = {
    **HEADS,
    "patch_size": 2,
    "num_layers": 4,
    "pooled_projection_dim": 16,
    "in_channels": CHANNELS,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": 8,
    "max_sequence_length": 16,
}


def mochi_transformer(seed: int = 0, **changes: object) -> MochiTransformer3DModel:
    """Makes a random Mochi transformer in eval mode: 4 layers, 2 heads of 12, patch 2, unless changed."""
    transformer = seeded(seed, MochiTransformer3DModel, **SETTINGS | changes)
    torch.nn.init.normal_(transformer.pos_frequencies)  # zeros, which turn nothing, when made
    return transformer


def mochi_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    lengths: Sequence[int] = (5,),
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Returns arguments of a call with 7 text tokens, a sample for each of `lengths`, its valid ones."""
    make, batch = randoms(seed), len(lengths)
    return {
        "hidden_states": make(batch, CHANNELS, frames, height, width),
        "encoder_hidden_states": make(batch, 7, TEXT_DIM),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": first(lengths, 7),
    }


def mochi_vae(seed: int = 0) -> AutoencoderKLMochi:
    """Makes a random Mochi VAE, 8 times smaller in space, 6 times in time, in eval mode."""
    sizes = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return seeded(seed, AutoencoderKLMochi, latent_channels=CHANNELS, layers_per_block=(1,) * 5, **sizes)


def mochi_pipeline(seed: int = 0, **changes: object) -> MochiPipeline:
    """Makes a random MochiPipeline with all parts; `changes` go to its transformer."""
    parts = {"vae": mochi_vae(seed), "transformer": mochi_transformer(seed, **changes)}
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return t5_pipeline(MochiPipeline, seed, scheduler=scheduler, **parts)
