"""Builds Wan's bundled model: text to video (3.3M parameters), and its VAE, which image to video shares."""

import math
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from scripts.toyworld.render import Scene
from scripts.toyworld.train.model import CAPTION_SLOTS, T5_SHAPE, Family, TinyDenoiser, plain_attention
from scripts.toyworld.train.scene_reader import SceneReader

HEADS, HEAD_WIDTH = 4, 48
TEXT_SLOTS = 512  # text tokens of WanPipeline: captions are padded to this with zero embeddings


def build_vae() -> AutoencoderKLWan:
    """Builds Wan's causal VAE on 2 x 2 pixels, 8 x 8 x 4 compression to 16 channels, 1.1M parameters."""
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
    """Builds a transformer of 4 heads x 48, with one token a latent pixel."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=in_channels,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=num_layers,
    )


class PaddedTextProcessor(WanAttnProcessor):
    """Computes cross-attention to `CAPTION_SLOTS` tokens of a caption, equal to that to all `TEXT_SLOTS`.

    Padding has the same key and value in every slot. So the last slot stands for all that were cut, if the
    logarithm of their number is added to its logit.
    """

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: Tensor, *_: object) -> Tensor:
        bias = hidden_states.new_zeros(1, 1, 1, CAPTION_SLOTS)
        bias[..., -1] = math.log(TEXT_SLOTS - CAPTION_SLOTS + 1)
        return super().__call__(attn, hidden_states, text, bias)


class TrainingProcessor(WanAttnProcessor):
    """Computes self-attention in plain products."""

    def __call__(
        self, attn: WanAttention, hidden_states: Tensor, _text: None, _mask: None, rotary_emb: tuple
    ) -> Tensor:
        projected = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = (rotate(x.unflatten(-1, (attn.heads, -1)), *rotary_emb) for x in projected)
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1))
        return attn.to_out[0](plain_attention(query, key, value).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of `[B, S, H, D]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def quieten(vae: AutoencoderKLWan) -> None:
    """Starts with little noise: the log variance at -7."""
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = -7.0


class Denoiser(TinyDenoiser):
    """Holds text encoder and transformer of Wan."""

    PIPELINE = WanPipeline
    BLOCKS = ("blocks",)
    PROCESSORS = (TrainingProcessor, WanAttnProcessor)
    TRANSFORMER: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(self.tokenizer), **T5_SHAPE))
        self.transformer = build_transformer(**self.TRANSFORMER)
        self.reader = SceneReader(self.transformer.blocks, HEADS * HEAD_WIDTH)
        self.use_training_attention(True)

    def use_training_attention(self, on: bool) -> None:
        """Switches the processors of cross-attention too."""
        super().use_training_attention(on)
        for block in self.transformer.blocks:
            block.attn2.processor = PaddedTextProcessor() if on else WanAttnProcessor()

    def embed(self, captions: list[str]) -> Tensor:
        """Embeds text as WanPipeline does, `[B, CAPTION_SLOTS, 64]`, zero after the caption."""
        tokens, mask = self.tokens(captions)
        return self.text_encoder(tokens, mask).last_hidden_state * mask[..., None]

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicts the velocity (noise - video) of `[B, 16, F, H, W]` at noise levels `[B]`."""
        return self.transformer(latents, 1000 * sigma, self.embed(captions), return_dict=False)[0]

    def more_loss(self, captions: list[str], scenes: list[Scene], frames: int, step: int) -> Tensor:
        """Returns the loss of the scenes that the blocks have to see."""
        return self.reader.loss(scenes, frames, step)

    def other_parts(self) -> dict[str, Any]:
        """Returns Wan's flow-matching UniPC."""
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return {"scheduler": UniPCMultistepScheduler(num_train_timesteps=1000, **flow)}


FAMILY = Family(build_vae, Denoiser, quieten)
