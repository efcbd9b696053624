"""How the configurations of each family's transformer and VAE read, and what is known of published models."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scripts.architecture import Architecture
from scripts.errors import UsageError, one_line

# Counted on the checkpoints' own config.json files; tests/test_known_models.py builds them without weights.
UMT5_XXL, T5_XXL, CLIP_VISION = 5_680_910_336, 4_762_310_656, 630_766_080
LLAMA_8B, LLAVA_8B, CLIP_TEXT = 7_505_186_816, 8_355_272_704, 123_060_480
WAN_VAE, WAN22_VAE, HUNYUAN_VAE, MOCHI_VAE = 126_892_531, 704_688_668, 246_478_803, 459_748_611
MOCHI_FRAMES, MOCHI_TEXT, WAN_TEXT, WAN_IMAGE = 6, 256, 512, 257
# By the kind of condition: 256 tokens of text, or 252 after every second or fourth of the image's 576.
HUNYUAN_TEXT = {None: 256, "latent_concat": 252 + 576 // 2, "token_replace": 252 + 576 // 4}

# Float32 tensors of the VAE's last layers that decoding on the CPU holds at once, measured: of Wan 13 to 16,
# where torch unfolds a convolution's input, as of fewer than 32 channels, 39 to 43; of HunyuanVideo, which
# upsamples twice as many channels, 11.8; of Mochi 6.4, with one resnet a block 5.3.
WIDE, WAN_COPIES, NARROW_WAN_COPIES, HUNYUAN_COPIES, MOCHI_COPIES = 32, 15, 42.5, 11.8, (5.3, 6.4)
HUNYUAN_CHUNK, HUNYUAN_STRIDE = 17, 12  # frames that diffusers decodes at once, and from one to the next


def from_configs(transformer: dict, vae: dict, parameters: dict[str, int]) -> Architecture:
    """Architecture from the two config.json files.

    Raises:
        UsageError: a class of transformer that is not known, or an entry that is missing or misshapen.
    """
    name = transformer.get("_class_name", "WanTransformer3DModel")
    if name not in READERS:
        raise UsageError(f"model.path: transformer is a {name}; known: {', '.join(READERS)}")
    try:
        return READERS[name](transformer, vae, parameters)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"model.path: transformer/config.json has no usable {one_line(error)}") from error


def _wan(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> Architecture:
    widest = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    base = widest // (vae.get("patch_size") or 1) ** 2  # the last layers make a patch's pixels at once
    return Architecture(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=transformer["ffn_dim"],
        patch=tuple(transformer["patch_size"]),
        text_tokens=WAN_TEXT + (WAN_IMAGE if transformer.get("image_dim") else 0),
        control_layers=tuple(transformer.get("vace_layers", ())),
        rope_length=transformer.get("rope_max_seq_len", 1024),
        rope_time=_wan_time(transformer["attention_head_dim"]),
        vae_base=base,
        vae_copies=WAN_COPIES if base >= WIDE else NARROW_WAN_COPIES,
        vae_frames=vae.get("scale_factor_temporal") or 4,
        vae_pixels=vae.get("scale_factor_spatial") or 8,
        parameters=parameters,
    )


def _wan_time(head_dim: int) -> tuple[int, float]:
    """Channels of a head that height and width, an even third each, leave to time; base."""
    return head_dim - 4 * (head_dim // 6), 10000.0


def _hunyuan_video(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> Architecture:
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    ffn, patch = int(transformer["mlp_ratio"] * width), transformer["patch_size"]
    return Architecture(
        layers=transformer["num_layers"] + transformer["num_single_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=ffn,
        patch=(transformer["patch_size_t"], patch, patch),
        text_tokens=0,
        joint_text=HUNYUAN_TEXT[transformer.get("image_condition_type")],
        token_macs=4 * width**2 + 2 * width * ffn,
        rope_length=None,
        rope_time=(transformer.get("rope_axes_dim", (16, 56, 56))[0], transformer.get("rope_theta", 256.0)),
        vae_base=vae["block_out_channels"][0],
        vae_copies=HUNYUAN_COPIES,
        vae_chunk=HUNYUAN_CHUNK,
        vae_stride=HUNYUAN_STRIDE,
        vae_frames=vae.get("temporal_compression_ratio", 4),
        vae_pixels=vae.get("spatial_compression_ratio", 8),
        takes_guidance=transformer.get("guidance_embeds", True),
        parameters=parameters,
    )


def _mochi(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> Architecture:
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    ffn, patch = 8 * width // 3, transformer["patch_size"]
    return Architecture(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=2 * ffn,  # a gated feed-forward makes two hidden tensors at once
        patch=(1, patch, patch),
        text_tokens=0,
        joint_text=transformer.get("max_sequence_length", MOCHI_TEXT),
        token_macs=4 * width**2 + 3 * width * ffn,
        rope_length=None,
        vae_base=vae["decoder_block_out_channels"][0],
        vae_copies=MOCHI_COPIES[vae.get("layers_per_block", [3])[0] > 1],
        vae_chunk=None,
        vae_frames=MOCHI_FRAMES,
        vae_pixels=8,
        parameters=parameters,
    )


READERS: dict[str, Callable[[dict, dict, dict], Architecture]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "MochiTransformer3DModel": _mochi,
}
WAN_14B = Architecture(
    layers=40,
    heads=40,
    head_dim=128,
    ffn=13824,
    rope_time=_wan_time(128),
    parameters={"transformer": 14_288_491_584, "text_encoder": UMT5_XXL, "vae": WAN_VAE},
)
WAN_I2V_14B = replace(
    WAN_14B,
    text_tokens=WAN_TEXT + WAN_IMAGE,
    parameters=WAN_14B.parameters | {"transformer": 16_394_878_784, "image_encoder": CLIP_VISION},
)
HUNYUAN_CONFIG = {
    "num_layers": 20,
    "num_single_layers": 40,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
}
MOCHI_CONFIG = {"num_layers": 48, "num_attention_heads": 24, "attention_head_dim": 128, "patch_size": 2}
HUB_MODELS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WAN_14B,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": replace(
        WAN_14B,
        layers=30,
        heads=12,
        ffn=8960,
        parameters=WAN_14B.parameters | {"transformer": 1_418_996_800},
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": replace(
        WAN_14B, parameters=WAN_14B.parameters | {"transformer_2": 14_288_491_584}
    ),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": WAN_I2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": WAN_I2V_14B,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": replace(
        WAN_14B,
        parameters=WAN_14B.parameters | dict.fromkeys(("transformer", "transformer_2"), 14_288_901_184),
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": replace(
        WAN_14B,
        layers=30,
        heads=24,
        ffn=14336,
        vae_base=64,
        vae_pixels=16,
        parameters=WAN_14B.parameters | {"transformer": 4_999_787_712, "vae": WAN22_VAE},
    ),
    "Wan-AI/Wan2.1-VACE-14B-diffusers": replace(
        WAN_14B,
        control_layers=(0, 5, 10, 15, 20, 25, 30, 35),
        parameters=WAN_14B.parameters | {"transformer": 17_337_592_896},
    ),
    "hunyuanvideo-community/HunyuanVideo": _hunyuan_video(
        HUNYUAN_CONFIG,
        {"block_out_channels": [128]},
        {
            "transformer": 12_821_012_544,
            "text_encoder": LLAMA_8B,
            "text_encoder_2": CLIP_TEXT,
            "vae": HUNYUAN_VAE,
        },
    ),
    "hunyuanvideo-community/HunyuanVideo-I2V": _hunyuan_video(
        HUNYUAN_CONFIG | {"image_condition_type": "token_replace"},
        {"block_out_channels": [128]},
        {
            "transformer": 12_821_012_544,
            "text_encoder": LLAVA_8B,
            "text_encoder_2": CLIP_TEXT,
            "vae": HUNYUAN_VAE,
        },
    ),
    "genmo/mochi-1-preview": _mochi(
        MOCHI_CONFIG,
        {"decoder_block_out_channels": [128]},
        {"transformer": 10_027_677_744, "text_encoder": T5_XXL, "vae": MOCHI_VAE},
    ),
}
