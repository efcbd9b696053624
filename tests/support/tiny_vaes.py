"""VAEs so narrow that a tile takes seconds, and what their sizes follow from."""

from dataclasses import replace

from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLMochi

from scripts.run.model_info import ModelInfo, from_configs
from tests.support.tiny_hunyuan import hunyuan_transformer
from tests.support.tiny_mochi import mochi_transformer

TILE = 128  # pixels a side, half of diffusers' own


VAES = {
    "hunyuan_video": {
        "latent_channels": 4,
        "block_out_channels": (16, 32, 32, 32),  # twice as many before the last, as HunyuanVideo's
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
    "mochi": {
        "latent_channels": 12,
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
    },
}


CLASSES = {"hunyuan_video": AutoencoderKLHunyuanVideo, "mochi": AutoencoderKLMochi}


TRANSFORMERS = {"hunyuan_video": hunyuan_transformer, "mochi": mochi_transformer}


def architecture(family: str) -> ModelInfo:
    """As read from the tiny models' own configurations, with small tiles."""
    transformer = TRANSFORMERS[family]()
    config = {"_class_name": type(transformer).__name__, **transformer.config}
    return replace(from_configs(config, VAES[family], {}), vae_tile=TILE)
