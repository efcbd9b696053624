"""The parts of the bundled text-to-video model (a Wan of 3.3M parameters), and how they are saved."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from toyworld.render import VOCABULARY

TEXT_SLOTS = 512  # text tokens of WanPipeline: captions are padded to this with zero embeddings
CAPTION_SLOTS = 24  # enough for every caption; the rest is padding
GLUE = ("a", "moving", "on", "background", ",", ".")


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


def build_transformer() -> WanTransformer3DModel:
    """6 layers, 4 heads x 48; one token a latent pixel."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=48,
        text_dim=64,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the toy world; other words become <unk>."""
    words = ["<pad>", "</s>", "<unk>", *GLUE, *sum(VOCABULARY.values(), ())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("grey", "gray")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, width 64."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


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
    """Self-attention in plain products: compiled, it is faster than SDPA at a few hundred tokens."""

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
        query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        mixed = logits.softmax(dim=-1).to(value.dtype) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs of neighbouring channels, `[B, S, H, D]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Denoiser(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()
        self.use_training_attention(True)

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        for block in self.transformer.blocks:
            block.attn1.set_processor(TrainingProcessor() if on else WanAttnProcessor())
            block.attn2.set_processor(PaddedTextProcessor() if on else WanAttnProcessor())

    def embed(self, captions: list[str]) -> Tensor:
        """Text embeddings as WanPipeline makes them, `[B, CAPTION_SLOTS, 64]`, zero after the caption."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=CAPTION_SLOTS, return_tensors="pt")
        mask = tokens.attention_mask.to(self.text_encoder.device)
        hidden = self.text_encoder(tokens.input_ids.to(mask.device), mask).last_hidden_state
        return hidden * mask[..., None]

    def forward(self, latents: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        """Predicted velocity (noise - video) of `[B, 16, F, H, W]` at noise levels `[B]`."""
        text = self.embed(captions)
        return self.transformer(latents, 1000 * sigma, text, return_dict=False)[0]


def load_parts(folder: Path) -> tuple[AutoencoderKLWan, Denoiser]:
    """VAE and denoiser, in float32, of a model that `save_pipeline` has written."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    vae, denoiser = build_vae(), Denoiser()
    vae.load_state_dict(pipeline.vae.state_dict())
    statistics = {name: pipeline.vae.config[name] for name in ("latents_mean", "latents_std")}
    vae.register_to_config(**statistics)
    denoiser.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    denoiser.transformer.load_state_dict(pipeline.transformer.state_dict())
    return vae, denoiser


def check_target(folder: Path) -> None:
    """Raises ValueError unless a model may be put there: nothing yet, an empty folder, or another model."""
    is_model = (folder / "model_index.json").is_file()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_model and not is_empty:
        raise ValueError(f"out must be a new folder or one that holds a model, got {folder}")


def save_pipeline(
    folder: Path, vae: AutoencoderKLWan, denoiser: Denoiser, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a WanPipeline folder to a temporary name, then puts it in place of the model at `folder`."""
    check_target(folder)
    denoiser.use_training_attention(False)
    pipeline = WanPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder.eval(),
        vae=vae.eval(),
        scheduler=build_scheduler(),
        transformer=denoiser.transformer.eval(),
    ).to(dtype=dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipeline.save_pretrained(Path(temporary) / "new", safe_serialization=True)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        (Path(temporary) / "new").rename(folder)
