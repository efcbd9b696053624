"""Tiny random relatives of Wan: image to video, Wan2.2 A14B and TI2V-5B, VACE."""

import torch
from diffusers import (
    DiffusionPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.support.tiny import CHANNELS, WAN, assemble, randoms, seeded, wan_inputs, wan_transformer

CONTROL = 2 * CHANNELS + 64  # channels: inactive, reactive, and the mask's 8 x 8 pixels
IMAGE_DIM = 16
OF_IMAGE = {"in_channels": 2 * CHANNELS + 4, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 24}


def vace_transformer(seed: int = 0, **changes: object) -> WanVACETransformer3DModel:
    """Makes a random Wan-VACE transformer in eval mode: 4 layers, control at 0 and 2, 2 heads of 12."""
    control = {"vace_layers": [0, 2], "vace_in_channels": CONTROL}
    return seeded(seed, WanVACETransformer3DModel, **WAN | control | changes)


def vace_inputs(
    frames: int = 6, height: int = 12, width: int = 16, *, batch: int = 1, seed: int = 0, **more: float
) -> dict[str, torch.Tensor]:
    """Returns those of `wan_inputs`, and control latents."""
    control = randoms(seed)(batch, CONTROL, frames, height, width)
    inputs = wan_inputs(frames, height, width, batch=batch, seed=seed, **more)
    return inputs | {"control_hidden_states": control}


def image_encoder(seed: int = 0) -> CLIPVisionModel:
    """Makes a random CLIP of width 16 on 16 x 16 images in eval mode."""
    layers = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(hidden_size=IMAGE_DIM, image_size=16, patch_size=8, **layers)
    return seeded(seed, CLIPVisionModel, config)


def image_processor() -> CLIPImageProcessor:
    """Makes what prepares images for `image_encoder`."""
    return CLIPImageProcessor(crop_size=16, size=16)


def i2v_pipeline(seed: int = 0, last: bool = False) -> WanImageToVideoPipeline:
    """Makes one like Wan2.1 I2V, image embeddings in cross-attention; `last`: of two images, as FLF2V."""
    last_image = {"pos_embed_seq_len": 2 * 5} if last else {}  # of each image 4 patches and the class
    return assemble(
        WanImageToVideoPipeline,
        seed,
        transformer=wan_transformer(seed, **OF_IMAGE, **last_image),
        image_encoder=image_encoder(seed),
        image_processor=image_processor(),
    )


def a14b_i2v_pipeline(seed: int = 0) -> WanImageToVideoPipeline:
    """Makes one like Wan2.2 I2V-A14B: two experts, no image embeddings."""
    experts = [wan_transformer(seed + i, in_channels=2 * CHANNELS + 4) for i in range(2)]
    parts = {"transformer": experts[0], "transformer_2": experts[1], "boundary_ratio": 0.9}
    return assemble(WanImageToVideoPipeline, seed, **parts)


def ti2v_pipeline(seed: int = 0, image: bool = False) -> DiffusionPipeline:
    """Makes one like Wan2.2 TI2V-5B: one timestep for each token."""
    cls = WanImageToVideoPipeline if image else WanPipeline
    return assemble(cls, seed, transformer=wan_transformer(seed), expand_timesteps=True)


def vace_pipeline(seed: int = 0, experts: int = 1) -> WanVACEPipeline:
    """Makes one like Wan2.1 VACE, or with two experts like Wan2.2 VACE."""
    parts = {"transformer": vace_transformer(seed)}
    if experts == 2:
        parts |= {"transformer_2": vace_transformer(seed + 1), "boundary_ratio": 0.8}
    return assemble(WanVACEPipeline, seed, **parts)
