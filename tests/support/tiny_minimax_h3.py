"""A tiny random MiniMax-H3: transformer, arguments of a call, modular pipelines."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Blocks,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    ModularPipeline,
)
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support.tiny import CHANNELS, HEADS, TEXT_DIM, randoms, seeded
from tests.support.tiny_hunyuan import qwen_tokenizer

TEXT, AUDIO = 7, 3  # text tokens; tokens of each of the two audio channels
OTHERS = TEXT + 2 * AUDIO
SETTINGS = {
    **HEADS,
    "hidden_size": 16,  # not heads times channels, as in the published model
    "num_layers": 4,
    "num_refiner_layers": 1,
    "ffn_dim": 32,
    "in_channels": CHANNELS,
    "audio_in_channels": 6,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "time_embed_hidden_dim": 16,
    "time_embed_dim": 8,
    "rope_freq_dim": 1,
}


def minimax_h3_transformer(seed: int = 0, **changes: object) -> MiniMaxH3Transformer3DModel:
    """Makes a random MiniMax-H3 transformer in eval mode: 4 layers, 2 heads of 12, unless changed."""
    return seeded(seed, MiniMaxH3Transformer3DModel, **SETTINGS | changes)


def minimax_h3_inputs(
    frames: int = 6,
    height: int = 12,
    width: int = 16,
    *,
    batch: int = 1,
    timestep: float = 500.0,
    seed: int = 0,
    anchors: tuple[str, ...] = (),
    video_first: bool = True,
) -> dict[str, object]:
    """Returns arguments of a call: sizes of latents, 7 text tokens, 6 of audio, keyframes at `anchors`.

    The rows are in the order of the pipeline, text, keyframes, audio and video, unless the video comes first.
    """
    make, sizes = randoms(seed), (frames, height, width, AUDIO)
    text = torch.ones(TEXT, dtype=torch.int64)
    places, tags, video, audio, text, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        text, *sizes, (1, 2, 2), audio_channels=2, audio_tag=2, video_tag=0, keyframe_anchors=anchors
    )
    given = len(video) - frames * height * width // 4
    levels = torch.zeros_like(tags)
    levels[audio], levels[video[:given]] = 1, 2
    back = OTHERS + given if video_first else 0
    return {
        "hidden_states": make(batch, len(video), 4 * CHANNELS),
        "audio_hidden_states": make(batch, len(audio), 6),
        "encoder_hidden_states": make(batch, TEXT, TEXT_DIM),
        "timestep": torch.tensor([timestep / 1000, 0.95, 0.999]),
        "timestep_indices": levels.roll(-back),
        "token_tags": tags.roll(-back),
        "position_ids": places.roll(-back, 0),
        "video_indices": (video - back) % len(tags),
        "audio_indices": (audio - back) % len(tags),
        "text_indices": (text - back) % len(tags),
    }


def minimax_h3_modular(seed: int = 0) -> tuple[ModularPipeline, dict[str, object]]:
    """Makes the denoising blocks as a pipeline, and arguments for 37 x 2 x 3 tokens and 421 others."""
    pipeline = MiniMaxH3CoreDenoiseStep().init_pipeline()
    schedulers = {
        "scheduler": MiniMaxH3Scheduler(shift=12.0),
        "audio_scheduler": MiniMaxH3Scheduler(shift=3.0),
    }
    transformer = minimax_h3_transformer(seed, in_channels=24, audio_in_channels=32)
    pipeline.update_components(transformer=transformer, **schedulers)
    text = {"prompt_embeds": randoms(seed)(1, TEXT, TEXT_DIM), "text_token_tags": torch.ones(TEXT).long()}
    return pipeline, text | {"height": 64, "width": 96, "num_frames": 124, "num_inference_steps": 5}


def minimax_h3_vae(seed: int = 0, **changes: object) -> AutoencoderKLMiniMaxH3:
    """Makes a random VAE with 4 latent channels, 16 times smaller in space, unless changed."""
    sizes = {"latent_channels": CHANNELS, "latents_mean": (0.0,) * CHANNELS, "latents_std": (1.0,) * CHANNELS}
    encoder = {"block_out_channels": (4,) * 6, "layers_per_block": 1, "norm_num_groups": 2}
    decoder = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "ffn_mult": 2}
    decoder = {f"decoder_{name}": number for name, number in decoder.items()}
    return seeded(seed, AutoencoderKLMiniMaxH3, **sizes, **encoder, **decoder, **changes)


def minimax_h3_folder(folder: Path, seed: int = 0) -> ModularPipeline:
    """Saves a random modular pipeline, as diffusers does; returns it without Qwen3-VL's processor.

    Its image processor makes a token of 32 x 32 pixels.
    """
    tokenizer = qwen_tokenizer()
    marks = {name: f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks.values())})
    numbers = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    numbers["image_token_id"], numbers["video_token_id"] = (
        numbers.pop(f"{x}_pad_token_id") for x in ("image", "video")
    )
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = {"vocab_size": len(tokenizer), "hidden_size": TEXT_DIM, "intermediate_size": 16, "pad_token_id": 0}
    text |= heads | {"num_hidden_layers": 51, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "patch_size": 16}
    vision |= {"out_hidden_size": TEXT_DIM, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **numbers)
    audio = {"encoder_dim": 4, "encoder_rates": (20, 40), "latent_dim": 12, "latent_channels": 6}
    audio |= {"decoder_dim": 4, "decoder_rates": (20, 40), "decoder_kernel_sizes": (40, 80)}
    audio |= {"num_attention_heads": 2, "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
    audio |= {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),)}
    pipeline = MiniMaxH3Blocks().init_pipeline()
    pipeline.update_components(
        text_encoder=seeded(seed, Qwen3VLForConditionalGeneration, config),
        tokenizer=tokenizer,
        transformer=minimax_h3_transformer(seed),
        vae=minimax_h3_vae(seed),
        audio_vae=seeded(seed, AutoencoderKLMiniMaxH3Audio, **audio),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    images = Qwen2VLImageProcessorPil(patch_size=16, temporal_patch_size=2, merge_size=2)
    images.save_pretrained(folder / "processor")
    return pipeline
