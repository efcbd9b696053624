"""Reads the numbers of a model from its configurations, without loading a weight; one function a family."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scripts.run.errors import UsageError, one_line
from scripts.run.model_info import ModelInfo

MOCHI_FRAMES, MOCHI_TEXT, WAN_TEXT, WAN_IMAGE = 6, 256, 512, 257
LTX_TEXT, LTX2_TEXT, MOTIF_TEXT = 128, 1024, 512
KANDINSKY_TEXT, KANDINSKY_POSITIONS = 512, 128
MINIMAX_TEXT = 256  # of a prompt, which is not padded
HUNYUAN15_TEXT = 729 + 256 + 1000  # image, glyphs, prompt
# Kind of condition -> tokens: 256 of text, or 252 and every second or fourth of the image's 576.
HUNYUAN_TEXT = {None: 256, "latent_concat": 252 + 576 // 2, "token_replace": 252 + 576 // 4}

# Float32 tensors of the VAE's last layers that decoding on the CPU holds at once, measured. Wan: 13 to 16, or
# 39 to 43 if torch unfolds a convolution's input, as it does below 32 channels. HunyuanVideo, which upsamples
# twice as many channels: 11.8. Mochi: 6.4, or 5.3 with one resnet a block. LTX-Video: 4.6.
# HunyuanVideo 1.5: 6.5. MiniMax-H3, whose decoder is a transformer: 20.
WIDE, WAN_COPIES, NARROW_WAN_COPIES, HUNYUAN_COPIES, MOCHI_COPIES = 32, 15, 42.5, 11.8, (5.3, 6.4)
LTX_COPIES, LTX2_COPIES, HUNYUAN15_COPIES, MINIMAX_COPIES = 4.6, 6.5, 6.5, 20
HUNYUAN_CHUNK, HUNYUAN_STRIDE = 17, 12  # frames that diffusers decodes at once, and from one to the next
AT_LEAST_1 = ("layers", "heads", "head_dim", "ffn", "patch", "vae_base", "vae_frames", "vae_pixels")


def from_configs(transformer: dict, vae: dict, parameters: dict[str, int]) -> ModelInfo:
    """Makes a ModelInfo from the two config.json files.

    Raises:
        UsageError: the transformer's class is unknown, or an entry is missing or misshapen.
    """
    name = transformer.get("_class_name", "WanTransformer3DModel")
    if name not in READERS:
        raise UsageError(f"model.path: the transformer is a {name}; allowed: {', '.join(READERS)}")
    try:
        model = READERS[name](transformer, vae, parameters)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError) as error:
        raise UsageError(f"model.path: transformer/config.json has no usable {one_line(error)}") from error
    for name in AT_LEAST_1:
        value = getattr(model, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(number, int) and number >= 1 for number in numbers):
            raise UsageError(
                f"model.path: the config.json files of transformer and vae give {value!r:.40} as `{name}`; "
                "download them again"
            )
    return model


def _wan(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> ModelInfo:
    image, both = transformer.get("image_dim"), transformer.get("pos_embed_seq_len")  # CLIP's tokens of both
    conditioned = transformer.get("in_channels", 16) > transformer.get("out_channels", 16)
    return ModelInfo(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=transformer["ffn_dim"],
        patch=tuple(transformer["patch_size"]),
        latents=transformer.get("out_channels") or transformer.get("in_channels", 16),
        text_tokens=WAN_TEXT + (both or (WAN_IMAGE if image else 0)),
        last_image="needed" if both else "taken" if conditioned and not image else "none",
        control_layers=tuple(transformer.get("vace_layers", ())),
        rope_length=transformer.get("rope_max_seq_len", 1024),
        rope_time=wan_time(transformer["attention_head_dim"]),
        **wan_vae(vae),
        parameters=parameters,
    )


def wan_vae(vae: dict[str, Any]) -> dict[str, Any]:
    """Returns what a ModelInfo says of Wan's VAE, which decodes whole frames, four at once."""
    widest = vae.get("decoder_base_dim") or vae.get("base_dim", 96)
    base = widest // (vae.get("patch_size") or 1) ** 2  # the last layers make a patch's pixels at once
    return {
        "vae_base": base,
        "vae_copies": WAN_COPIES if base >= WIDE else NARROW_WAN_COPIES,
        "vae_chunk": 4,
        "vae_stride": None,
        "vae_frames": vae.get("scale_factor_temporal") or 4,
        "vae_pixels": vae.get("scale_factor_spatial") or 8,
    }


def wan_time(head_dim: int) -> tuple[int, float]:
    """Returns a head's channels for time (height and width take an even third each), and the base."""
    return head_dim - 4 * (head_dim // 6), 10000.0


def wan_animate_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    model = _wan(transformer, vae, parameters)
    adapter = 2 * model.width**2 // transformer.get("inject_face_latents_blocks", 5)  # query and output
    face = transformer.get("motion_encoder_size") or 512
    return replace(model, token_macs=model.macs + adapter, references=1, face=face)


def hunyuan_video_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    ffn, patch = int(transformer["mlp_ratio"] * width), transformer["patch_size"]
    return ModelInfo(
        layers=transformer["num_layers"] + transformer["num_single_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=ffn,
        patch=(transformer["patch_size_t"], patch, patch),
        latents=transformer.get("out_channels", 16),
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


def hunyuan_video15_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    model = hunyuan_video_info(transformer | {"num_single_layers": 0}, vae, parameters)
    sizes = {"joint_text": HUNYUAN15_TEXT, "target_size": transformer.get("target_size", 640)}
    return replace(model, **sizes, vae_copies=HUNYUAN15_COPIES, vae_chunk=math.inf, vae_stride=None)


def mochi_info(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> ModelInfo:
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    ffn, patch = 8 * width // 3, transformer["patch_size"]
    return ModelInfo(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=2 * ffn,  # a gated feed-forward makes two hidden tensors at once
        patch=(1, patch, patch),
        latents=transformer.get("out_channels") or transformer.get("in_channels", 12),
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


def ltx_info(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> ModelInfo:
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    patch, scale = transformer["patch_size"], 2 ** sum(vae["spatio_temporal_scaling"])
    return ModelInfo(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        ffn=4 * width,
        patch=(transformer["patch_size_t"], patch, patch),
        latents=transformer["out_channels"],
        text_tokens=LTX_TEXT,
        rope_length=None,
        vae_base=vae["decoder_block_out_channels"][0] // vae["patch_size"] ** 2,
        vae_copies=LTX_COPIES,
        vae_chunk=math.inf,
        vae_tile=512,
        vae_overlap=8,
        vae_frames=vae.get("temporal_compression_ratio") or scale * vae["patch_size_t"],
        vae_pixels=vae.get("spatial_compression_ratio") or scale * vae["patch_size"],
        pixel_factor=32,
        parameters=parameters,
    )


def ltx2_info(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> ModelInfo:
    """Leaves the work on the sound out: at 24 frames a second it has a fiftieth of the video's tokens."""
    model = ltx_info(transformer, vae, parameters)
    width = model.width, transformer["audio_num_attention_heads"] * transformer["audio_attention_head_dim"]
    narrower = (vae.get("upsample_factor") or [1])[0]  # the last layers have fewer channels by this factor
    return replace(
        model,
        text_tokens=LTX2_TEXT,
        token_macs=6 * width[0] ** 2 + 2 * width[0] * model.ffn + 4 * width[0] * width[1],
        vae_base=max(1, model.vae_base // narrower),
        vae_copies=LTX2_COPIES,
    )


def motif_video_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    decoder, double = transformer.get("num_decoder_layers", 0), transformer["num_layers"]
    single = transformer["num_single_layers"] - decoder
    model = hunyuan_video_info(transformer | {"num_single_layers": single}, {"block_out_channels": [1]}, {})
    kinds = {"dual": double, "single": single}
    crossed = sum(n for kind, n in kinds.items() if transformer.get(f"enable_text_cross_attention_{kind}"))
    cross = 2 * model.width**2 * crossed // model.layers  # query and output of video tokens
    sizes = {"joint_text": MOTIF_TEXT, "token_macs": model.macs + cross, "decoder_layers": decoder}
    return replace(model, **wan_vae(vae), **sizes, parameters=parameters)


def kandinsky5_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    """Makes a ModelInfo of a Kandinsky 5; with NABLA its tokens are in tiles of 8 x 8."""
    head, in_tiles = sum(transformer["axes_dims"]), transformer.get("attention_type") == "nabla"
    return ModelInfo(
        layers=transformer["num_visual_blocks"],
        heads=transformer["model_dim"] // head,
        head_dim=head,
        ffn=transformer["ff_dim"],
        patch=tuple(transformer["patch_size"]),
        latents=transformer["out_visual_dim"],
        text_tokens=KANDINSKY_TEXT,
        rope_length=KANDINSKY_POSITIONS,
        vae_base=vae["block_out_channels"][0],
        vae_copies=HUNYUAN_COPIES,
        vae_chunk=HUNYUAN_CHUNK,
        vae_stride=HUNYUAN_STRIDE,
        vae_frames=vae.get("temporal_compression_ratio", 4),
        vae_pixels=vae.get("spatial_compression_ratio", 8),
        pixel_factor=128 if in_tiles else 16,
        order="tiles" if in_tiles else "raster",
        parameters=parameters,
    )


def cosmos_info(transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]) -> ModelInfo:
    """Makes a ModelInfo of a Cosmos with Wan's VAE. Each token has a time, and modulations of its own."""
    model = _wan(transformer | {"ffn_dim": 0}, vae, parameters)
    hidden, lora = int(transformer["mlp_ratio"] * model.width), transformer["adaln_lora_dim"]
    return replace(
        model,
        ffn=hidden + 7 * model.width // 2,  # the memory of modulations, measured
        token_macs=6 * model.width**2 + 2 * model.width * hidden + 12 * model.width * lora,
        rope_length=max(s // p for s, p in zip(transformer["max_size"], model.patch, strict=True)),
        rope_time=None,
        last_image="none",
    )


def minimax_h3_info(
    transformer: dict[str, Any], vae: dict[str, Any], parameters: dict[str, int]
) -> ModelInfo:
    """Makes a ModelInfo of a MiniMax-H3, whose VAE decodes with a transformer."""
    heads, head = transformer["num_attention_heads"], transformer["attention_head_dim"]
    hidden, ffn = transformer["hidden_size"], transformer["ffn_dim"]
    pixels, frames = (
        math.prod(vae["spatial_downsample_factors"]),
        math.prod(vae["temporal_downsample_factors"]),
    )
    width = vae["decoder_num_attention_heads"] * vae["decoder_attention_head_dim"]
    clip = vae["clip_length"], -(-vae["clip_length"] // frames)
    return ModelInfo(
        layers=transformer["num_layers"],
        heads=heads,
        head_dim=head,
        ffn=2 * ffn,  # a gated feed-forward makes two hidden tensors at once
        patch=tuple(transformer["patch_size"]),
        latents=transformer["in_channels"],
        text_tokens=0,
        joint_text=MINIMAX_TEXT,
        token_macs=4 * hidden * heads * head + 3 * hidden * ffn,
        rope_length=None,
        vae_base=max(1, width // (frames * pixels**2)),
        vae_copies=MINIMAX_COPIES,
        vae_chunk=(clip[1] + -vae["token_drop"] % clip[1]) * frames,
        vae_stride=clip[0],
        vae_clip=clip,
        vae_frames=frames,
        vae_pixels=pixels,
        last_image="taken",
        sound=2,
        parameters=parameters,
    )


READERS: dict[str, Callable[[dict, dict, dict], ModelInfo]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan,
    "WanAnimateTransformer3DModel": wan_animate_info,
    "SkyReelsV2Transformer3DModel": _wan,
    "AnyFlowTransformer3DModel": _wan,
    "ChronoEditTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": hunyuan_video_info,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15_info,
    "MochiTransformer3DModel": mochi_info,
    "LTXVideoTransformer3DModel": ltx_info,
    "LTX2VideoTransformer3DModel": ltx2_info,
    "MotifVideoTransformer3DModel": motif_video_info,
    "Kandinsky5Transformer3DModel": kandinsky5_info,
    "CosmosTransformer3DModel": cosmos_info,
    "MiniMaxH3Transformer3DModel": minimax_h3_info,
}
