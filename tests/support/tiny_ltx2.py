"""A tiny random LTX-2: transformer, arguments of a call, pipelines."""

import string

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from tests.support.tiny import HEADS, TEXT_DIM, first, quiet, randoms, seeded

CHANNELS = 8
AUDIO = 5  # audio tokens
WIDTH = 24  # of the video; the audio has 16
SETTINGS = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": CHANNELS,
    "audio_out_channels": CHANNELS,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 4,
    "caption_channels": TEXT_DIM,
    "rope_type": "split",
}
DOWN, RATE = "LTX2VideoDownBlock3D", 16000
CONNECTOR = {
    "num_attention_heads": 2,
    "attention_head_dim": TEXT_DIM // 2,
    "num_layers": 1,
    "num_learnable_registers": 8,
}
NEWER = {  # what LTX-2.3 adds: gates, prompts modulated by the noise level, perturbed attention
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
}


def ltx2_transformer(seed: int = 0, **changes: object) -> LTX2VideoTransformer3DModel:
    """Makes a random LTX-2.3 transformer in eval mode: 4 layers, 2 heads of 12, unless changed."""
    return seeded(seed, LTX2VideoTransformer3DModel, **SETTINGS | NEWER | changes)


def ltx2_inputs(
    frames: int = 6,
    height: int = 6,
    width: int = 8,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
) -> dict[str, object]:
    """Returns arguments of a call: latents `[batch, frames * height * width, 8]`, 7 text tokens, 5 valid."""
    make, times = randoms(seed), torch.full((batch,), timestep)
    texts, valid = (make(batch, 7, TEXT_DIM) for _ in range(2)), first(batch * [5], 7).float()
    return {
        "hidden_states": make(batch, frames * height * width, CHANNELS),
        "audio_hidden_states": make(batch, AUDIO, CHANNELS),
        **dict(zip(("encoder_hidden_states", "audio_encoder_hidden_states"), texts, strict=True)),
        "timestep": times,
        "sigma": times,
        "encoder_attention_mask": valid,
        "audio_encoder_attention_mask": valid,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": AUDIO,
    }


def ltx2_vae(seed: int = 0) -> AutoencoderKLLTX2Video:
    """Makes a random VAE of LTX-2, 4 times smaller in space and time, in eval mode."""
    coder = {
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True),
    }
    coder |= {f"decoder_{name}": value for name, value in coder.items()}
    coder |= {"downsample_type": ("spatiotemporal",) * 2, "upsample_type": ("spatiotemporal",) * 2}
    coder |= {"upsample_residual": (True, True), "upsample_factor": (1, 1), "down_block_types": 2 * (DOWN,)}
    return seeded(seed, AutoencoderKLLTX2Video, latent_channels=CHANNELS, patch_size=1, **coder)


def gemma(seed: int = 0) -> Gemma3ForConditionalGeneration:
    """Makes a random Gemma 3 of one layer of text and one of images, in eval mode."""
    text = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    return seeded(seed, Gemma3ForConditionalGeneration, config)


def ltx2_pipeline(seed: int = 0, cls: type = LTX2Pipeline, **changes: object) -> DiffusionPipeline:
    """Makes a random LTX2Pipeline, or another `cls`, with all parts; `changes` go to its transformer.

    Its sound has 16000 samples a second, of 160 for each frame of its spectrogram.
    """
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_lowercase]
    sides = [f"{stream}_connector_{{}}" for stream in ("video", "audio")]
    connectors = {side.format(name): value for side in sides for name, value in CONNECTOR.items()}
    dynamic = {"base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    sound = {"base_channels": CHANNELS, "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 8}
    vocoder = {"upsample_kernel_sizes": [32, 20], "upsample_factors": [16, 10], "resnet_kernel_sizes": [3]}
    vocoder |= {"in_channels": 16, "hidden_channels": 8, "resnet_dilations": [[1, 3, 5]]}
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **dynamic),
        "vae": ltx2_vae(seed),
        "audio_vae": seeded(seed, AutoencoderKLLTX2Audio, **sound),
        "text_encoder": gemma(seed),
        "tokenizer": GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]),
        "connectors": seeded(
            seed,
            LTX2TextConnectors,
            TEXT_DIM,
            2,
            **connectors,
            rope_type="split",
            rope_double_precision=False,
        ),
        "transformer": ltx2_transformer(seed, **changes),
        "vocoder": seeded(seed, LTX2Vocoder, output_sampling_rate=RATE, **vocoder),
    }
    return quiet(cls(**parts))


def ltx2_image_pipeline(seed: int = 0) -> DiffusionPipeline:
    """Makes a random LTX2ImageToVideoPipeline, whose tokens of the image have a timestep of their own."""
    return ltx2_pipeline(seed, LTX2ImageToVideoPipeline)
