"""HunyuanVideo's bundled model: text to video by joint attention, captions through a Llama and a CLIP."""

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

from radial_attn.models.hunyuan_video import attention_layers, project
from scripts.toyworld.train.model import (
    CONV_GAIN,
    END,
    PAD,
    Family,
    TinyDenoiser,
    build_tokenizer,
    mean_latents,
    normalise,
    plain_attention,
)

SKIPPED_LAYERS = 2  # the last ones of the Llama, of which HunyuanVideoPipeline takes no output
CLIP_SLOTS = 77  # text tokens of the CLIP
LIKENESS, WORDS_APART = 10.0, 0.1  # scale of its cosines, weight of the caption loss


def build_vae() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's causal video VAE, 8 x 8 x 4 compression to 16 channels, 1.1M parameters."""
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(16, 24, 32, 40), layers_per_block=1, norm_num_groups=1, latent_channels=16
    )


def quieten(vae: AutoencoderKLHunyuanVideo) -> None:
    """Starts with little noise, the log variance at -7, and a signal that keeps its size on the way through.

    Layers outside the branches of residual blocks stand before no nonlinearity.
    """
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = -7.0
        for name, layer in vae.named_modules():
            in_branch = any(part in name for part in ("conv1", "conv2", "conv_out"))
            if isinstance(layer, nn.Conv3d) and not in_branch:
                layer.weight /= CONV_GAIN


def set_statistics(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> None:
    """What latents `[B, 16, F, H, W]` are scaled with, into the VAE's configuration."""
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def encode(vae: AutoencoderKLHunyuanVideo, video: Tensor) -> Tensor:
    """Latents `[B, 16, F, H, W]` of videos `[B, 3, frames, height, width]` in [-1, 1], without noise."""
    vae.use_framewise_encoding = False
    return mean_latents(vae, video)


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """2 double and 4 single layers, 4 heads x 36; one token a latent pixel; no guidance distilled in."""
    return HunyuanVideoTransformer3DModel(
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=36,
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


def build_llama(vocabulary: int) -> LlamaModel:
    """Four layers, width 64."""
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=2 + SKIPPED_LAYERS, **ENCODER))


def build_clip(vocabulary: int) -> CLIPTextModel:
    """Two layers, width 64."""
    sizes = {"num_hidden_layers": 2, "projection_dim": 64, "max_position_embeddings": CLIP_SLOTS}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **sizes, **ENCODER))


class TrainingProcessor(HunyuanVideoAttnProcessor2_0):
    """Joint attention in plain products."""

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
    """Text encoders and transformer, trained together."""

    PIPELINE = HunyuanVideoPipeline
    BLOCKS = ("transformer_blocks", "single_transformer_blocks")
    PARTS = ("text_encoder", "text_encoder_2", "transformer")

    def __init__(self):
        super().__init__()
        self.text_encoder = build_llama(len(self.tokenizer))
        self.text_encoder_2 = build_clip(len(self.tokenizer))
        self.transformer = build_transformer()
        self.words = nn.Parameter(torch.randn(len(self.tokenizer), self.text_encoder.config.hidden_size))
        self.use_training_attention(True)

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        for layer in attention_layers(self.transformer):
            layer.set_processor(TrainingProcessor() if on else HunyuanVideoAttnProcessor2_0())

    def take_over(self, pipeline: HunyuanVideoPipeline) -> None:
        """Weights of a HunyuanVideo; single layers that it lacks begin as identities."""
        lacking = self.transformer.single_transformer_blocks[pipeline.transformer.config.num_single_layers :]
        for block in lacking:
            nn.init.zeros_(block.norm.linear.weight)
            nn.init.zeros_(block.norm.linear.bias)
        for name in self.PARTS:
            part = getattr(self, name)
            part.load_state_dict(part.state_dict() | getattr(pipeline, name).state_dict())

    def embed(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Text `[B, T, 64]`, its mask `[B, T]` and the pooled text `[B, 64]`, as the pipeline makes them."""
        tokens, mask = self.tokens(captions)
        return self.llama_text(tokens, mask), mask, self.text_encoder_2(tokens).pooler_output

    def llama_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The Llama's text `[B, T, 64]` of tokens and mask `[B, T]`, from the layer that pipelines take."""
        return self.text_encoder(tokens, mask, output_hidden_states=True).hidden_states[-SKIPPED_LAYERS - 1]

    def caption_loss(self, captions: list[str]) -> Tensor:
        """Cross-entropy of the direction of each token of the Llama's text, which has to tell its word.

        Without it two shapes ended 2 % apart in that text, too near for the transformer to tell them.
        """
        tokens, mask = self.tokens(captions)
        text = functional.normalize(self.llama_text(tokens, mask).float(), dim=-1)[mask.bool()]
        cosines = text @ functional.normalize(self.words, dim=-1).T
        return WORDS_APART * functional.cross_entropy(LIKENESS * cosines, tokens[mask.bool()])

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicted velocity (noise - video) of `[B, 16, F, H, W]` at noise levels `[B]`."""
        text, mask, pooled = self.embed(captions)
        return self.transformer(latents, 1000 * sigma, text, mask, pooled, return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKLHunyuanVideo) -> HunyuanVideoPipeline:
        """The HunyuanVideoPipeline of these weights."""
        self.use_training_attention(False)
        return HunyuanVideoPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder.eval(),
            tokenizer_2=build_tokenizer(),
            text_encoder_2=self.text_encoder_2.eval(),
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=self.transformer.eval(),
        )


FAMILY = Family(
    build_vae,
    Denoiser,
    quieten,
    encode,
    set_statistics,
    normalise,
    mosaic=True,
    chunked=True,
    defaults={"outline_steps": 1000, "steps": 4200},
)
