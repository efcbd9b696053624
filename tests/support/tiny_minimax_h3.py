"""A tiny random MiniMax-H3: transformer, arguments of a call, modular pipeline."""

import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel, ModularPipeline
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

from tests.support.tiny import CHANNELS, HEADS, TEXT_DIM, randoms, seeded

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
