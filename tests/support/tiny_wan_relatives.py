"""Tiny random models that diffusers copied from Wan, the arguments of their calls, and pipelines."""

import torch
from diffusers import (
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
)
from transformers import CLIPVisionModelWithProjection

from tests.support.tiny import CHANNELS, WAN, assemble, randoms, seeded, wan_inputs
from tests.support.tiny_wan import OF_IMAGE, image_encoder, image_processor

PATCH = {"patch_size": (1, 2, 2)}
FACE = 16  # pixels of a side
ANIMATE = {
    "in_channels": 2 * CHANNELS + 4,
    "latent_channels": CHANNELS,
    "image_dim": None,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": FACE,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 16,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,  # any number of layers has whole groups
}


def skyreels_transformer(seed: int = 0, **changes: object) -> SkyReelsV2Transformer3DModel:
    """Makes a random SkyReels-V2 transformer in eval mode: 4 layers, 2 heads of 12."""
    return seeded(seed, SkyReelsV2Transformer3DModel, **WAN | PATCH | changes)


def chronoedit_transformer(seed: int = 0, **changes: object) -> ChronoEditTransformer3DModel:
    """Makes a random ChronoEdit transformer in eval mode: 4 layers, 2 heads of 12."""
    return seeded(seed, ChronoEditTransformer3DModel, **WAN | PATCH | changes)


def anyflow_transformer(seed: int = 0, **changes: object) -> AnyFlowTransformer3DModel:
    """Makes a random AnyFlow transformer in eval mode: 4 layers, 2 heads of 12."""
    return seeded(seed, AnyFlowTransformer3DModel, **WAN | PATCH | changes)


def animate_transformer(seed: int = 0, **changes: object) -> WanAnimateTransformer3DModel:
    """Makes a random Wan-Animate transformer in eval mode: 4 layers, 2 heads of 12, one face adapter each."""
    return seeded(seed, WanAnimateTransformer3DModel, **WAN | PATCH | ANIMATE | changes)


def anyflow_inputs(
    frames: int = 6, height: int = 12, width: int = 16, **more: float
) -> dict[str, torch.Tensor]:
    """Returns those of `wan_inputs` with frames first, and two timesteps for each frame."""
    inputs = wan_inputs(frames, height, width, **more)
    times = inputs["timestep"][:, None].expand(-1, frames)
    latents = inputs["hidden_states"].transpose(1, 2)
    return inputs | {"hidden_states": latents, "timestep": times, "r_timestep": times / 2}


def animate_inputs(
    frames: int = 6, height: int = 12, width: int = 16, *, batch: int = 1, seed: int = 0, **more: float
) -> dict[str, torch.Tensor]:
    """Returns those of `wan_inputs`, latents of a pose and a video of a face; there are 2 frames or more."""
    make = randoms(seed + 1)
    inputs = wan_inputs(frames, height, width, batch=batch, seed=seed, **more)
    return inputs | {
        "hidden_states": make(batch, 2 * CHANNELS + 4, frames, height, width),
        "pose_hidden_states": make(batch, CHANNELS, frames - 1, height, width),
        "face_pixel_values": make(batch, 3, 4 * (frames - 2) + 1, FACE, FACE),
    }


def skyreels_pipeline(seed: int = 0) -> SkyReelsV2Pipeline:
    """Makes a random SkyReelsV2Pipeline with all parts."""
    return assemble(SkyReelsV2Pipeline, seed, transformer=skyreels_transformer(seed))


def skyreels_image_pipeline(seed: int = 0) -> SkyReelsV2ImageToVideoPipeline:
    """Makes one from an image, whose encoder has a projection that it leaves out."""
    encoder = seeded(seed, CLIPVisionModelWithProjection, image_encoder().config)
    parts = {"image_encoder": encoder, "image_processor": image_processor()}
    return assemble(
        SkyReelsV2ImageToVideoPipeline, seed, transformer=skyreels_transformer(seed, **OF_IMAGE), **parts
    )


def skyreels_forcing_pipeline(seed: int = 0) -> SkyReelsV2DiffusionForcingPipeline:
    """Makes a random SkyReelsV2DiffusionForcingPipeline, whose transformer is told the frame rate."""
    transformer = skyreels_transformer(seed, inject_sample_info=True)
    return assemble(SkyReelsV2DiffusionForcingPipeline, seed, transformer=transformer)


def anyflow_pipeline(seed: int = 0) -> AnyFlowPipeline:
    """Makes a random AnyFlowPipeline with its own scheduler."""
    pipeline = assemble(AnyFlowPipeline, seed, transformer=anyflow_transformer(seed))
    pipeline.scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    return pipeline


def chronoedit_pipeline(seed: int = 0) -> ChronoEditPipeline:
    """Makes a random ChronoEditPipeline with all parts."""
    parts = {"image_encoder": image_encoder(seed), "image_processor": image_processor()}
    return assemble(ChronoEditPipeline, seed, transformer=chronoedit_transformer(seed, **OF_IMAGE), **parts)


def animate_pipeline(seed: int = 0) -> WanAnimatePipeline:
    """Makes a random WanAnimatePipeline with all parts, and faces of 16 x 16 pixels."""
    parts = {"image_encoder": image_encoder(seed), "image_processor": image_processor()}
    return assemble(WanAnimatePipeline, seed, transformer=animate_transformer(seed, **OF_IMAGE), **parts)
