"""Mochi's bundled model: text to video by joint attention with a narrower stream of text, through a T5."""

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

from radial_attn.models.mochi import attention_layers, project
from scripts.toyworld.train.model import (
    T5_SHAPE,
    Family,
    TinyDenoiser,
    mean_latents,
    normalise,
    plain_attention,
    set_channel_statistics,
)

MOCHI_SIDE = 192  # tokens: positions are stretched to a square of this side, whatever the size of the video


def build_vae() -> AutoencoderKLMochi:
    """Mochi's causal video VAE, 8 x 8 x 6 compression to 12 channels, 1.2M parameters."""
    return AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 64),
        decoder_block_out_channels=(32, 32, 32, 64),
        layers_per_block=(0, 1, 1, 1, 1),
        add_attention_block=(False,) * 5,
    )


def quieten(vae: AutoencoderKLMochi) -> None:
    """Starts with little noise, by a log variance below 0, and blind to the sines of colours.

    The last layer has no bias, but what it gets is positive on average (0.207 of a standard normal), so
    weights of one sign do for one.
    """
    with torch.no_grad():
        encoder = vae.encoder
        encoder.proj_out.weight[vae.config.latent_channels :] = -7.0 / (0.207 * encoder.proj_out.in_features)
        encoder.proj_in.weight[:, 3:] = 0.0
        vae.decoder.proj_out.weight *= 0.25  # no norm stands before it


def build_transformer() -> MochiTransformer3DModel:
    """5 layers, 4 heads x 36; one token a latent pixel."""
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
    """Radians a position of each axis, `[3, 1, pairs]`: each pair of channels turns along one axis.

    `tokens`: height and width of the videos, over which Mochi's positions stretch to `MOCHI_SIDE`.
    """
    frequencies = torch.zeros(3, 1, pairs)
    for axis in range(3):
        own = torch.arange(axis, pairs, 3)
        speeds = 100.0 ** -(torch.arange(len(own)) / len(own))
        frequencies[axis, 0, own] = speeds / (1 if axis == 0 else MOCHI_SIDE / tokens)
    return frequencies


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A two-layer T5 encoder, width 64."""
    return T5EncoderModel(T5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", **T5_SHAPE))


class TrainingProcessor(MochiAttnProcessor2_0):
    """Joint attention in plain products."""

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
    """Text encoder and transformer, trained together."""

    PIPELINE = MochiPipeline
    BLOCKS = ("transformer_blocks",)
    PARTS = ("text_encoder", "transformer")

    def __init__(self):
        super().__init__()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()
        self.use_training_attention(True)

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        for layer in attention_layers(self.transformer):
            layer.processor = TrainingProcessor() if on else MochiAttnProcessor2_0()

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text `[B, T, 64]` and its mask `[B, T]`; as in the pipeline, an empty caption has none."""
        tokens, mask = self.tokens(captions)
        filled = torch.tensor([[bool(caption)] for caption in captions], device=mask.device)
        mask = mask.bool() & filled
        return self.text_encoder(tokens, mask).last_hidden_state, mask

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicted velocity (noise - video) of `[B, 12, F, H, W]`; Mochi's own points to the video."""
        text, mask = self.embed(captions)
        return -self.transformer(latents, text, 1000 * (1 - sigma), mask, return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKLMochi) -> MochiPipeline:
        """The MochiPipeline of these weights."""
        self.use_training_attention(False)
        return MochiPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder.eval(),
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            transformer=self.transformer.eval(),
            force_zeros_for_empty_prompt=True,
        )


FAMILY = Family(
    build_vae,
    Denoiser,
    quieten,
    mean_latents,
    set_channel_statistics,
    normalise,
    frames=31,
    clip_frames=13,
    frames_step=6,
    defaults={"steps": 4500},
)
