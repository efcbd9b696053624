"""Wan's bundled models: text to video (3.3M parameters), and its VAE, which image to video has too."""

import math
from typing import ClassVar

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from scripts.toyworld.train.model import (
    CAPTION_SLOTS,
    T5_SHAPE,
    Family,
    TinyDenoiser,
    mean_latents,
    normalise,
    plain_attention,
    set_channel_statistics,
)

TEXT_SLOTS = 512  # text tokens of WanPipeline: captions are padded to this with zero embeddings


def build_vae() -> AutoencoderKLWan:
    """Wan's causal video VAE on 2 x 2 pixels, 8 x 8 x 4 compression to 16 channels, 1.1M parameters."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        dim_mult=[1, 2, 2],
        temperal_downsample=[True, True],
        z_dim=16,
        num_res_blocks=1,
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )


def build_transformer(in_channels: int = 16, num_layers: int = 6) -> WanTransformer3DModel:
    """4 heads x 48; one token a latent pixel."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=in_channels,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=num_layers,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, width 64."""
    return UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **T5_SHAPE))


def build_scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    """Wan's flow-matching UniPC."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=flow_shift,
    )


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention to a caption cut to `CAPTION_SLOTS`, equal to attention to all `TEXT_SLOTS`.

    Padding embeds to one and the same key and value in every slot, so the last slot can stand for all that
    were cut when the logarithm of their number is added to its logit.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple | None = None,
    ) -> Tensor:
        bias = hidden_states.new_zeros(1, 1, 1, CAPTION_SLOTS)
        bias[..., -1] = math.log(TEXT_SLOTS - CAPTION_SLOTS + 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


class TrainingProcessor(WanAttnProcessor):
    """Self-attention in plain products."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple | None = None,
    ) -> Tensor:
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = (rotate(x.unflatten(-1, (attn.heads, -1)), *rotary_emb) for x in projected)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        return attn.to_out[0](plain_attention(query, key, value).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs of neighbouring channels, `[B, S, H, D]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def quieten(vae: AutoencoderKLWan) -> None:
    """Starts with little noise: the log variance at -7."""
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -7.0


class Denoiser(TinyDenoiser):
    """Text encoder and transformer, trained together."""

    PIPELINE = WanPipeline
    BLOCKS = ("blocks",)
    PARTS = ("text_encoder", "transformer")
    TRANSFORMER: ClassVar[dict[str, int]] = {}

    def __init__(self):
        super().__init__()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer(**self.TRANSFORMER)
        self.use_training_attention(True)

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        for block in self.transformer.blocks:
            block.attn1.set_processor(TrainingProcessor() if on else WanAttnProcessor())
            block.attn2.set_processor(PaddedTextProcessor() if on else WanAttnProcessor())

    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings as WanPipeline makes them, `[B, CAPTION_SLOTS, 64]`, zero after the caption."""
        tokens, mask = self.tokens(captions)
        return self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicted velocity (noise - video) of `[B, 16, F, H, W]` at noise levels `[B]`."""
        return self.transformer(latents, 1000 * sigma, self.embed(captions), return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKLWan) -> WanPipeline:
        """The WanPipeline of these weights."""
        self.use_training_attention(False)
        return WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder.eval(),
            vae=vae.eval(),
            scheduler=build_scheduler(),
            transformer=self.transformer.eval(),
        )


FAMILY = Family(build_vae, Denoiser, quieten, mean_latents, set_channel_statistics, normalise)
