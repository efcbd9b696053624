"""VAEs so narrow that a tile takes seconds, and what their sizes follow from."""

from dataclasses import replace

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMochi,
)

from scripts.run.model_info import ModelInfo
from scripts.run.model_readers import from_configs
from tests.support.tiny_hunyuan import hunyuan15_transformer, hunyuan_transformer
from tests.support.tiny_ltx import ltx_transformer
from tests.support.tiny_ltx2 import ltx2_transformer
from tests.support.tiny_minimax_h3 import minimax_h3_transformer
from tests.support.tiny_mochi import mochi_transformer

TILES = {  # pixels a side, half of diffusers' own
    "hunyuan_video": 128,
    "hunyuan_video15": 128,
    "mochi": 128,
    "ltx": 256,
    "ltx2": 256,
    "minimax_h3": 128,
}


VAES = {
    "hunyuan_video": {
        "latent_channels": 4,
        "block_out_channels": (16, 32, 32, 32),  # twice as many before the last, as HunyuanVideo's
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "hunyuan_video15": {
        "latent_channels": 4,
        "block_out_channels": (32, 64, 64, 64, 64),  # twice as many before the last, as its own
        "layers_per_block": 1,
    },
    "mochi": {
        "latent_channels": 12,
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
    "ltx": {
        "latent_channels": 8,
        "block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (64,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "ltx2": {
        "latent_channels": 8,
        "block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (128, 256, 512),  # half of its own
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "minimax_h3": {
        "latent_channels": 4,
        "block_out_channels": (4,) * 6,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 16,  # half of its own
    },
}
CLASSES = {
    "hunyuan_video": AutoencoderKLHunyuanVideo,
    "hunyuan_video15": AutoencoderKLHunyuanVideo15,
    "mochi": AutoencoderKLMochi,
    "ltx": AutoencoderKLLTXVideo,
    "ltx2": AutoencoderKLLTX2Video,
    "minimax_h3": AutoencoderKLMiniMaxH3,
}
TRANSFORMERS = {
    "hunyuan_video": hunyuan_transformer,
    "hunyuan_video15": hunyuan15_transformer,
    "mochi": mochi_transformer,
    "ltx": ltx_transformer,
    "ltx2": ltx2_transformer,
    "minimax_h3": minimax_h3_transformer,
}


def tiled(family: str) -> torch.nn.Module:
    """Makes a VAE that decodes in small tiles."""
    vae, model = CLASSES[family](**VAES[family]).eval(), architecture(family)
    vae.enable_tiling()
    for axis in ("height", "width"):
        setattr(vae, f"tile_sample_min_{axis}", model.vae_tile)
        setattr(vae, f"tile_sample_stride_{axis}", model.vae_step)
        setattr(vae, f"tile_sample_min_overlap_{axis}", model.vae_tile - model.vae_step)
        setattr(vae, f"tile_latent_min_{axis}", model.vae_tile // model.vae_pixels)
    return vae


def architecture(family: str) -> ModelInfo:
    """As read from the tiny models' own configurations, with small tiles."""
    transformer = TRANSFORMERS[family]()
    config = {"_class_name": type(transformer).__name__, **transformer.config}
    return replace(
        from_configs(config, {**CLASSES[family](**VAES[family]).config}, {}), vae_tile=TILES[family]
    )
