"""A tiny random LTX-2: transformer, arguments of a call."""

import torch
from diffusers import LTX2VideoTransformer3DModel

from tests.support.tiny import HEADS, TEXT_DIM, first, randoms, seeded

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
