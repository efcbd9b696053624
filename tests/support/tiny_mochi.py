"""A tiny random Mochi: transformer, arguments of a call, pipeline."""

import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from tests.support.tiny import TEXT_DIM, assemble, t5_encoder

CHANNELS = 12  # the pipeline's statistics of the latents are for 12


def mochi_transformer(seed: int = 0, **changes: object) -> MochiTransformer3DModel:
    """A random Mochi transformer in eval mode: 4 layers, 2 heads of 12, patch 2, unless changed."""
    settings = {
        "patch_size": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 4,
        "pooled_projection_dim": 16,
        "in_channels": CHANNELS,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 8,
        "max_sequence_length": 16,
    }
    torch.manual_seed(seed)
    transformer = MochiTransformer3DModel(**(settings | changes)).eval()
    torch.nn.init.normal_(transformer.pos_frequencies)  # zeros, which turn nothing, when made
    return transformer


def mochi_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
    lengths: tuple[int, ...] = (5,),
) -> dict[str, torch.Tensor]:
    """Arguments of a call: latents `[batch, 12, frames, height, width]`, 7 text tokens.

    `lengths`: valid text tokens of the samples in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = torch.tensor([lengths[sample % len(lengths)] for sample in range(batch)])
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, height, width, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT_DIM, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": torch.arange(7) < valid[:, None],
    }


def mochi_vae(seed: int = 0) -> AutoencoderKLMochi:
    """A random Mochi VAE, 8 times smaller in space, 6 times in time, in eval mode."""
    torch.manual_seed(seed)
    sizes = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return AutoencoderKLMochi(latent_channels=CHANNELS, layers_per_block=(1,) * 5, **sizes).eval()


def mochi_pipeline(seed: int = 0, **changes: object) -> MochiPipeline:
    """A random MochiPipeline with all parts; `changes` go to its transformer."""
    return assemble(
        MochiPipeline,
        seed,
        text_encoder=t5_encoder(seed),
        vae=mochi_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        transformer=mochi_transformer(seed, **changes),
    )
