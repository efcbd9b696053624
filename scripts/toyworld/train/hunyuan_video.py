"""Builds HunyuanVideo's bundled model: joint attention, captions through a Llama and a CLIP."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from radial_attn.models.hunyuan_video import project
from scripts.toyworld.render import Scene
from scripts.toyworld.train.model import (
    CONV_GAIN,
    END,
    PAD,
    Family,
    TinyDenoiser,
    build_tokenizer,
    mean_latents,
    plain_attention,
)
from scripts.toyworld.train.scene_reader import SceneReader

HEADS, HEAD_WIDTH = 4, 36
SKIPPED_LAYERS = 2  # HunyuanVideoPipeline takes the Llama's text from before the last two layers
CLIP_SLOTS = 77  # text tokens of the CLIP
LIKENESS, WORDS_APART = 10.0, 0.1  # scale of its cosines, weight of the caption loss


def build_vae() -> AutoencoderKLHunyuanVideo:
    """Builds HunyuanVideo's causal VAE, 8 x 8 x 4 compression to 16 channels, 1.1M parameters."""
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 24, 32, 40), layers_per_block=1, norm_num_groups=1, latent_channels=16
    )


def quieten(vae: AutoencoderKLHunyuanVideo) -> None:
    """Starts with little noise, the log variance at -7, and a signal that keeps its size.

    Layers outside the branches of residual blocks have no nonlinearity after them.
    """
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = -7.0
        for name, layer in vae.named_modules():
            in_branch = any(part in name for part in ("conv1", "conv2", "conv_out"))
            if isinstance(layer, nn.Conv3d) and not in_branch:
                layer.weight /= CONV_GAIN


def set_statistics(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> None:
    """Writes the scale of latents `[B, 16, F, H, W]` into the VAE's configuration."""
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def encode(vae: AutoencoderKLHunyuanVideo, video: Tensor) -> Tensor:
    """Returns latents `[B, 16, F, H, W]`, without noise, of videos `[B, 3, F, H, W]` in [-1, 1]."""
    vae.use_framewise_encoding = False
    return mean_latents(vae, video)


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """Builds 2 double and 4 single layers, 4 heads x 36, one token a latent pixel, no distilled guidance."""
    return HunyuanVideoTransformer3DModel(
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        rope_axes_dim=(12, 12, 12),
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
    )


ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": END,
}


class TrainingProcessor(HunyuanVideoAttnProcessor2_0):
    """Computes joint attention in plain products."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple,
    ) -> tuple[Tensor, Tensor]:
        streams = project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        bias = torch.where(attention_mask, 0.0, -torch.inf)
        mixed = plain_attention(*streams, bias).flatten(2)
        video, text = mixed.tensor_split([hidden_states.shape[1]], dim=1)
        if attn.to_out is None:
            return video, text
        return attn.to_out[0](video), attn.to_add_out(text)


class Denoiser(TinyDenoiser):
    """Holds text encoders and transformer of HunyuanVideo."""

    PIPELINE = HunyuanVideoPipeline
    BLOCKS = ("transformer_blocks", "single_transformer_blocks")
    PARTS = ("text_encoder", "text_encoder_2", "transformer")
    PROCESSORS = (TrainingProcessor, HunyuanVideoAttnProcessor2_0)

    def __init__(self) -> None:
        super().__init__()
        sizes = ENCODER | {"vocab_size": len(self.tokenizer)}
        self.text_encoder = LlamaModel(LlamaConfig(num_hidden_layers=2 + SKIPPED_LAYERS, **sizes))
        sizes |= {"projection_dim": 64, "max_position_embeddings": CLIP_SLOTS}
        self.text_encoder_2 = CLIPTextModel(CLIPTextConfig(num_hidden_layers=2, **sizes))
        self.transformer = build_transformer()
        self.words = nn.Parameter(torch.randn(len(self.tokenizer), HEADS * HEAD_WIDTH))
        self.refined = torch.empty(0)
        self.transformer.context_embedder.register_forward_hook(self.keep)
        self.reader = SceneReader(self.transformer.single_transformer_blocks, HEADS * HEAD_WIDTH)
        self.use_training_attention(True)

    def keep(self, _refiner: nn.Module, _inputs: tuple, text: Tensor) -> None:
        """Keeps the refined text `[B, T, width]` of a forward pass, for `caption_loss`."""
        self.refined = text

    def take_over(self, pipeline: HunyuanVideoPipeline) -> None:
        """Loads the weights of a HunyuanVideo; single layers that it lacks begin as identities."""
        lacking = self.transformer.single_transformer_blocks[pipeline.transformer.config.num_single_layers :]
        for block in lacking:
            nn.init.zeros_(block.norm.linear.weight)
            nn.init.zeros_(block.norm.linear.bias)
        for name in self.PARTS:
            part = getattr(self, name)
            part.load_state_dict(part.state_dict() | getattr(pipeline, name).state_dict())

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns text `[B, T, 64]`, mask `[B, T]` and pooled text `[B, 64]`, as the pipeline makes them."""
        tokens, mask = self.tokens(captions)
        layers = self.text_encoder(tokens, mask, output_hidden_states=True).hidden_states
        return layers[-SKIPPED_LAYERS - 1], mask, self.text_encoder_2(tokens).pooler_output

    def more_loss(self, captions: list[str], scenes: list[Scene], frames: int, step: int) -> Tensor:
        """Returns the losses of the words, and of the scenes that the blocks have to see."""
        return self.caption_loss(captions) + self.reader.loss(scenes, frames, step)

    def caption_loss(self, captions: list[str]) -> Tensor:
        """Returns the cross-entropy of each token of the last refined text, which must tell its word.

        Without this loss two shapes ended 0.3 % apart in this text, too close for the transformer.
        """
        tokens, mask = self.tokens(captions)
        text = functional.normalize(self.refined[mask.bool()].float(), dim=-1)
        cosines = text @ functional.normalize(self.words, dim=-1).T
        return WORDS_APART * functional.cross_entropy(LIKENESS * cosines, tokens[mask.bool()])

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicts the velocity (noise - video) of `[B, 16, F, H, W]` at noise levels `[B]`."""
        text, mask, pooled = self.embed(captions)
        return self.transformer(latents, 1000 * sigma, text, mask, pooled, return_dict=False)[0]

    def other_parts(self) -> dict[str, Any]:
        """Returns the scheduler, and the tokenizer of the CLIP."""
        return {"tokenizer_2": build_tokenizer(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}


FAMILY = Family(
    build_vae,
    Denoiser,
    quieten,
    encode,
    set_statistics,
    mosaic=True,
    chunked=True,
    defaults={"outline_steps": 1000, "steps": 4200},
)
