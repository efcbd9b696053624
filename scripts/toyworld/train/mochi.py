"""Builds Mochi's bundled model: joint attention with a narrower text stream, captions through a T5."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from radial_attn.models.mochi import project
from scripts.toyworld.train.model import T5_SHAPE, Family, TinyDenoiser, plain_attention

MOCHI_SIDE = 192  # tokens: positions of a video of any size are stretched to a square of this side


def build_vae() -> AutoencoderKLMochi:
    """Builds Mochi's causal VAE, 8 x 8 x 6 compression to 12 channels, 1.2M parameters."""
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 64),
        decoder_block_out_channels=(32, 32, 32, 64),
        layers_per_block=(0, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )


def quieten(vae: AutoencoderKLMochi) -> None:
    """Starts with little noise, by a log variance below 0, and ignores the sines of colours.

    The last layer has no bias. Its input is positive on average (0.207 for a standard normal), so weights of
    one sign act as a bias.
    """
    with torch.no_grad():
        encoder = vae.encoder
        encoder.proj_out.weight[vae.config.latent_channels :] = -7.0 / (0.207 * encoder.proj_out.in_features)
        encoder.proj_in.weight[:, 3:] = 0.0
        vae.decoder.proj_out.weight *= 0.25  # it has no norm before it


def build_transformer() -> MochiTransformer3DModel:
    """Builds 5 layers, 4 heads x 36, with one token a latent pixel."""
    transformer = MochiTransformer3DModel(
        patch_size=1,
        num_attention_heads=4,
        attention_head_dim=36,
        num_layers=5,
        in_channels=12,
        out_channels=12,
        pooled_projection_dim=64,
        text_embed_dim=64,
        time_embed_dim=64,
    )
    transformer.pos_frequencies.requires_grad_(False).copy_(rotary_frequencies(pairs=18))
    return transformer


def rotary_frequencies(pairs: int, tokens: int = 8) -> Tensor:
    """Returns radians a position of each axis, `[3, 1, pairs]`: each pair of channels turns along one axis.

    `tokens`: height and width of the videos, which Mochi's positions stretch to `MOCHI_SIDE`.
    """
    frequencies = torch.zeros(3, 1, pairs)
    for axis in range(3):
        turned = torch.arange(axis, pairs, 3)
        speeds = 100.0 ** -(torch.arange(len(turned)) / len(turned))
        frequencies[axis, 0, turned] = speeds / (1 if axis == 0 else MOCHI_SIDE / tokens)
    return frequencies


class TrainingProcessor(MochiAttnProcessor2_0):
    """Computes joint attention in plain products."""

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple,
    ) -> tuple[Tensor, Tensor]:
        streams = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        count = hidden_states.shape[1]
        bias = torch.where(attention_mask.bool(), 0.0, -torch.inf)
        bias = torch.nn.functional.pad(bias, (count, 0))[:, None, None]
        video, text = plain_attention(*streams, bias).flatten(2).tensor_split([count], dim=1)
        return attn.to_out[0](video), text if attn.context_pre_only else attn.to_add_out(text)


class Denoiser(TinyDenoiser):
    """Holds text encoder and transformer of Mochi."""

    PIPELINE = MochiPipeline
    BLOCKS = ("transformer_blocks",)
    PROCESSORS = (TrainingProcessor, MochiAttnProcessor2_0)

    def __init__(self) -> None:
        super().__init__()
        sizes = T5_SHAPE | {"vocab_size": len(self.tokenizer)}
        self.text_encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
        self.transformer = build_transformer()
        self.use_training_attention(True)

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Returns text `[B, T, 64]` and mask `[B, T]`; as in the pipeline, an empty caption has none."""
        tokens, mask = self.tokens(captions)
        filled = torch.tensor([[bool(caption)] for caption in captions], device=mask.device)
        mask = mask.bool() & filled
        return self.text_encoder(tokens, mask).last_hidden_state, mask

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicts the velocity (noise - video) of `[B, 12, F, H, W]`; Mochi's own points to the video."""
        text, mask = self.embed(captions)
        return -self.transformer(latents, text, 1000 * (1 - sigma), mask, return_dict=False)[0]

    def other_parts(self) -> dict[str, Any]:
        """Returns the scheduler, and how an empty prompt is embedded."""
        scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
        return {"scheduler": scheduler, "force_zeros_for_empty_prompt": True}


FAMILY = Family(
    build_vae, Denoiser, quieten, frames=31, clip_frames=13, frames_step=6, defaults={"steps": 4500}
)
