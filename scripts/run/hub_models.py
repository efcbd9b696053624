"""Knows the numbers of published models without a download, and reads those of any other model."""

import json
import math
import struct
from collections.abc import Collection
from dataclasses import replace
from os.path import isdir
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.load import REVISIONS, absent_expert, check_model, is_local, read_index
from radial_attn.models.runtime.transformers import NAMES
from scripts.run.config import ROOT, AnyModelConfig, find_path
from scripts.run.errors import UsageError, one_line
from scripts.run.model_info import ModelInfo
from scripts.run.model_readers import (
    WAN_IMAGE,
    WAN_TEXT,
    cosmos_info,
    from_configs,
    hunyuan_video15_info,
    hunyuan_video_info,
    kandinsky5_info,
    ltx2_info,
    ltx_info,
    minimax_h3_info,
    mochi_info,
    motif_video_info,
    wan_animate_info,
    wan_time,
)

PARTS = ("transformer", "transformer_2", "text_encoder", "text_encoder_2", "image_encoder", "vae")
PARTS += ("connectors", "audio_vae", "vocoder", "controlnet")
CONFIGURED = ("transformer", "vae")
# Counted on the checkpoints' own config.json files; their test builds them without weights.
UMT5_XXL, T5_XXL, CLIP_VISION = 5_680_910_336, 4_762_310_656, 630_766_080
LLAMA_8B, LLAVA_8B, CLIP_TEXT = 7_505_186_816, 8_355_272_704, 123_060_480
WAN_VAE, WAN22_VAE, HUNYUAN_VAE, MOCHI_VAE = 126_892_531, 704_688_668, 246_478_803, 459_748_611
GEMMA_12B, LTX2_VAE = 12_187_325_040, 1_222_479_601
LTX_VAE, HUNYUAN15_VAE, QWEN_7B, BYT5_SMALL = 419_193_649, 1_260_634_115, 7_070_619_136, 219_314_944
SIGLIP = 428_225_600
QWEN_VL_7B, T5_11B = 8_292_166_656, 4_864_791_552
WAN_14B = ModelInfo(
    layers=40,
    heads=40,
    head_dim=128,
    ffn=13824,
    rope_time=wan_time(128),
    parameters={"transformer": 14_288_491_584, "text_encoder": UMT5_XXL, "vae": WAN_VAE},
)


def _variant(parts: dict[str, int], **sizes: Any) -> ModelInfo:
    """Returns Wan 14B with other numbers of weights and other sizes."""
    return replace(WAN_14B, parameters=WAN_14B.parameters | parts, **sizes)


def _cosmos(heads: int, layers: int, weights: int, encoder: int = T5_11B, **more: int) -> ModelInfo:
    """Returns a Cosmos 2 or 2.5 of this width, depth and number of weights; `more` entries of its config."""
    sizes = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "mlp_ratio": 4.0}
    sizes |= {"patch_size": (1, 2, 2), "max_size": (128, 240, 240), "adaln_lora_dim": 256}
    parts = {"transformer": weights, "text_encoder": encoder, "vae": WAN_VAE}
    return cosmos_info(sizes | {"in_channels": 17, "out_channels": 16} | more, {}, parts)


WAN_I2V_14B = _variant(
    {"transformer": 16_394_878_784, "image_encoder": CLIP_VISION}, text_tokens=WAN_TEXT + WAN_IMAGE
)
FLF2V_IMAGES = 2 * WAN_IMAGE  # tokens of the two images, each with an embedding of 1280
HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}
HUNYUAN_SIZES = {"num_layers": 20, "num_single_layers": 40, "mlp_ratio": 4.0}
HUNYUAN_CONFIG = HEADS | HUNYUAN_SIZES | {"patch_size": 2, "patch_size_t": 1}
HUNYUAN_PARTS = {"transformer": 12_821_012_544, "text_encoder_2": CLIP_TEXT, "vae": HUNYUAN_VAE}
LTX_CONFIG = {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28}
LTX_CONFIG |= {"patch_size": 1, "patch_size_t": 1, "out_channels": 128}
LTX_VAE_CONFIG = {"decoder_block_out_channels": [128], "spatio_temporal_scaling": [True, True, True, False]}
LTX_VAE_CONFIG |= {"patch_size": 4, "patch_size_t": 1}
HUNYUAN15 = hunyuan_video15_info(
    {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 54, "mlp_ratio": 4.0}
    | {"patch_size": 1, "patch_size_t": 1, "out_channels": 32},
    {"block_out_channels": [128], "spatial_compression_ratio": 16},
    {"transformer": 8_326_608_160, "text_encoder": QWEN_7B, "text_encoder_2": BYT5_SMALL}
    | {"vae": HUNYUAN15_VAE},
)
HUNYUAN15_I2V = replace(HUNYUAN15, parameters=HUNYUAN15.parameters | {"image_encoder": SIGLIP})
ANIMATE_CONFIG = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
ANIMATE_CONFIG |= {"patch_size": (1, 2, 2), "in_channels": 36, "out_channels": 16, "image_dim": 1280}
MOTIF_CONFIG = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 12, "mlp_ratio": 4.0}
MOTIF_CONFIG |= {"num_single_layers": 24, "num_decoder_layers": 8, "patch_size": 2, "patch_size_t": 1}
MOCHI_CONFIG = HEADS | {"num_layers": 48, "patch_size": 2}
MINIMAX_CONFIG = {"num_attention_heads": 56, "attention_head_dim": 128, "hidden_size": 5376, "ffn_dim": 14336}
MINIMAX_CONFIG |= {"num_layers": 50, "patch_size": (1, 2, 2), "in_channels": 24}
MINIMAX_VAE_CONFIG = {"spatial_downsample_factors": (2, 2, 2, 2, 1, 1), "clip_length": 17, "token_drop": 3}
MINIMAX_VAE_CONFIG |= {"temporal_downsample_factors": (1, 2, 2, 1, 1, 1)}
MINIMAX_VAE_CONFIG |= {"decoder_num_attention_heads": 32, "decoder_attention_head_dim": 64}
KANDINSKY_LITE = kandinsky5_info(
    {"num_visual_blocks": 32, "model_dim": 1792, "axes_dims": (16, 24, 24), "ff_dim": 7168}
    | {"patch_size": (1, 2, 2), "out_visual_dim": 16},
    {"block_out_channels": [128]},
    {"transformer": 2_007_702_848, "text_encoder": QWEN_VL_7B, "text_encoder_2": CLIP_TEXT}
    | {"vae": HUNYUAN_VAE},
)
COSMOS_TRANSFER = _cosmos(
    16, 28, 2_413_864_960, QWEN_VL_7B, controlnet_block_every_n=7, img_context_dim_in=1152
)
HUB_MODELS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WAN_14B,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _variant(
        {"transformer": 1_418_996_800}, layers=30, heads=12, ffn=8960
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _variant({"transformer_2": 14_288_491_584}),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": WAN_I2V_14B,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": WAN_I2V_14B,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _variant(
        {"transformer": 16_394_878_784 + 1280 * FLF2V_IMAGES, "image_encoder": CLIP_VISION},
        text_tokens=WAN_TEXT + FLF2V_IMAGES,
        last_image="needed",
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _variant(
        dict.fromkeys(("transformer", "transformer_2"), 14_288_901_184), last_image="taken"
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _variant(
        {"transformer": 4_999_787_712, "vae": WAN22_VAE},
        layers=30,
        heads=24,
        ffn=14336,
        latents=48,
        vae_base=64,
        vae_pixels=16,
    ),
    "Wan-AI/Wan2.1-VACE-14B-diffusers": _variant(
        {"transformer": 17_337_592_896}, control_layers=(0, 5, 10, 15, 20, 25, 30, 35)
    ),
    "Wan-AI/Wan2.2-Animate-14B-Diffusers": wan_animate_info(
        ANIMATE_CONFIG,
        {},
        {
            "transformer": 17_274_816_884,
            "text_encoder": UMT5_XXL,
            "image_encoder": CLIP_VISION,
            "vae": WAN_VAE,
        },
    ),
    **dict.fromkeys((f"Skywork/SkyReels-V2-T2V-14B-{size}P-Diffusers" for size in (540, 720)), WAN_14B),
    **dict.fromkeys((f"Skywork/SkyReels-V2-DF-14B-{size}P-Diffusers" for size in (540, 720)), WAN_14B),
    "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers": _variant(
        {"transformer": 1_435_525_696}, layers=30, heads=12, ffn=8960
    ),
    **dict.fromkeys(
        (f"Skywork/SkyReels-V2-I2V-14B-{size}P-Diffusers" for size in (540, 720)),
        replace(
            WAN_I2V_14B,
            parameters=WAN_I2V_14B.parameters
            | {"image_encoder": CLIP_VISION + 1280 * 1024},  # and a projection
        ),
    ),
    "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers": _variant({"transformer": 14_316_026_944}),
    "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers": _variant(
        {"transformer": 1_421_752_384}, layers=30, heads=12, ffn=8960
    ),
    "nvidia/ChronoEdit-14B-Diffusers": WAN_I2V_14B,
    "hunyuanvideo-community/HunyuanVideo": hunyuan_video_info(
        HUNYUAN_CONFIG, {"block_out_channels": [128]}, HUNYUAN_PARTS | {"text_encoder": LLAMA_8B}
    ),
    "hunyuanvideo-community/HunyuanVideo-I2V": hunyuan_video_info(
        HUNYUAN_CONFIG | {"image_condition_type": "token_replace"},
        {"block_out_channels": [128]},
        HUNYUAN_PARTS | {"text_encoder": LLAVA_8B},
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": HUNYUAN15,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": replace(HUNYUAN15, target_size=960),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": HUNYUAN15_I2V,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v": replace(HUNYUAN15_I2V, target_size=960),
    "genmo/mochi-1-preview": mochi_info(
        MOCHI_CONFIG,
        {"decoder_block_out_channels": [128]},
        {"transformer": 10_027_677_744, "text_encoder": T5_XXL, "vae": MOCHI_VAE},
    ),
    # its transformer's numbers are those of the model card: its config.json was not at hand
    "Motif-Technologies/Motif-Video-2B": motif_video_info(
        MOTIF_CONFIG | {"enable_text_cross_attention_single": True},
        {},
        {"transformer": 2_037_809_600, "text_encoder": 4_299_918_192, "vae": WAN_VAE},
    ),
    "Lightricks/LTX-Video": ltx_info(
        LTX_CONFIG,
        LTX_VAE_CONFIG,
        {"transformer": 1_923_385_472, "text_encoder": T5_XXL, "vae": LTX_VAE},
    ),
    "Lightricks/LTX-2": ltx2_info(
        LTX_CONFIG
        | {"attention_head_dim": 128, "num_layers": 48}
        | {"audio_num_attention_heads": 32, "audio_attention_head_dim": 64},
        LTX_VAE_CONFIG
        | {"decoder_block_out_channels": [256], "upsample_factor": [2]}
        | {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
        {"transformer": 18_876_174_592, "text_encoder": GEMMA_12B, "vae": LTX2_VAE}
        | {"connectors": 1_431_475_200, "audio_vae": 53_248_146, "vocoder": 55_592_802},
    ),
    "nvidia/Cosmos-Predict2-2B-Video2World": _cosmos(16, 28, 1_956_413_440),
    "nvidia/Cosmos-Predict2-14B-Video2World": _cosmos(40, 36, 14_265_285_632),
    "nvidia/Cosmos-Predict2.5-2B": _cosmos(16, 28, 2_059_174_912, QWEN_VL_7B),
    "nvidia/Cosmos-Predict2.5-14B": _cosmos(40, 36, 14_368_047_104, QWEN_VL_7B),
    # by the configurations in diffusers' scripts/convert_cosmos_to_diffusers.py
    "nvidia/Cosmos-Transfer2.5-2B": replace(
        COSMOS_TRANSFER, parameters=COSMOS_TRANSFER.parameters | {"controlnet": 471_255_040}
    ),
    "MiniMaxAI/MiniMax-H3": minimax_h3_info(
        MINIMAX_CONFIG,
        MINIMAX_VAE_CONFIG,
        {"transformer": 33_122_992_896, "text_encoder": 33_357_390_064, "vae": 2_603_868_984}
        | {"audio_vae": 151_321_489},
    ),
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": KANDINSKY_LITE,
    # of the same sizes: its own config.json was not at hand
    "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers": KANDINSKY_LITE,
}
# Shifts of scheduler_config.json. Sources disagree on Wan2.1-I2V-14B-720P; Mochi has noise levels of its own.
SHIFTS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 3.0,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 3.0,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 3.0,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 3.0,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": 16.0,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 3.0,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0,
    "Wan-AI/Wan2.1-VACE-14B-diffusers": 3.0,
    "MiniMaxAI/MiniMax-H3": 12.0,
    "hunyuanvideo-community/HunyuanVideo": 7.0,
    "hunyuanvideo-community/HunyuanVideo-I2V": 17.0,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": 5.0,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v": 9.0,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v": 5.0,
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v": 7.0,
}
BOUNDARIES = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": 0.875, "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 0.9}


def read_model_info(path: str) -> ModelInfo:
    """Returns the ModelInfo of a folder in diffusers format or of a hub id.

    Known hub ids need no network. For others the two config.json files are fetched.

    Raises:
        UsageError: a config.json is missing, unreadable, out of reach or of an unknown family.
    """
    if Path(path).is_dir():
        folder = Path(path)
        folders = {part: folder / part for part in PARTS if (folder / part).is_dir()}
        if "transformer" not in folders:  # it may hold Wan2.2's second expert alone
            folders["transformer"] = folders.pop("transformer_2", folder / "transformer")
        parameters = {part: _count_parameters(weights) for part, weights in folders.items()}
        configs = (_read_json(folders.get(part, folder / part) / "config.json") for part in CONFIGURED)
        return from_configs(*configs, parameters)
    if path in HUB_MODELS:
        return HUB_MODELS[path]
    return from_configs(*(_fetch(path, f"{part}/config.json") for part in CONFIGURED), {})


def _read_json(file: Path) -> dict:
    """Reads a configuration file; UsageError if it is missing or not JSON."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"model.path: {file} is missing or holds no JSON object ({one_line(error)}); download it again"
        ) from error


def _count_parameters(folder: Path) -> int:
    """Counts the weights of the safetensors files in a folder, from their headers."""
    return sum(_count_file(file) for file in sorted(folder.glob("*.safetensors")))


def _count_file(file: Path) -> int:
    """Counts the elements of a safetensors file from its header: 8 bytes of length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UsageError(f"model.path: {file} is not a whole safetensors file ({one_line(error)})") from error


def _fetch(path: str, file: str) -> dict:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # the retries are many lines, the failure is one
    try:
        return _read_json(Path(hf_hub_download(path, file, revision=REVISIONS.get(path))))
    except (OSError, ValueError) as error:
        raise UsageError(hub_unreachable(path, error)) from error


def expert_notes(path: str, files: Collection[str] = ()) -> tuple[str, ...]:
    """Returns a line if a folder holds only one of two experts, which then makes every step.

    `files`: the transformers that have a file of their own.
    """
    absent = absent_expert(path, read_index(path), files) if is_local(path) else ""
    if not absent:
        return ()
    kept, steps = ("transformer_2", "last") if absent == "transformer" else ("transformer", "first")
    return (f"model.path has no {absent}: {kept}, the expert of the {steps} steps, makes every step",)


def hub_unreachable(path: str, error: BaseException) -> str:
    """Returns the error message for a hub id that cannot be read, with the remedy."""
    reason = one_line(error.__cause__ or error)
    return (
        f"model.path: got {path!r}, which is no folder here and cannot be read from the Hugging Face hub "
        f"({reason}); name a folder in diffusers format or a hub id within reach, or use "
        "configs/wan_tiny.yaml, which needs no download"
    )


def find_model(options: AnyModelConfig) -> str:
    """Returns `model.path` as a checked folder (index, parts, safetensors headers), or as a hub id.

    Raises:
        UsageError: the folder is missing, empty or not a model of the family, or a file in it is broken.
    """
    path = str(find_path(options.path)) if options.path else ""
    local, is_folder = is_local(path) or isdir((ROOT / path).parent), isdir(path)
    empty = bool(path) and is_folder and not any(Path(path).iterdir())
    if not path or empty or (local and not is_folder):
        raise UsageError(
            f"model.path: got {options.path!r}, which is {'an empty' if empty else 'no'} folder; name a "
            "folder in diffusers format (with model_index.json), or a hub id owner/name"
        )
    if not local:
        return path
    files = [name for name in NAMES if getattr(options, name, None) is not None]
    try:
        check_model(path, options.family, files)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"model.path: got {options.path!r}: {one_line(error)}") from error
    return path


def planned_boundary(path: str) -> float | None:
    """Returns `expert_boundary` of a folder, or what is known of a hub id without a download."""
    return expert_boundary(path) if is_local(path) else BOUNDARIES.get(path)


def expert_boundary(path: str) -> float | None:
    """Returns the noise level at which Wan2.2 changes its expert, None with one expert."""
    ratio = read_index(path).get("boundary_ratio")
    if ratio is None or (isinstance(ratio, float) and 0 < ratio < 1):
        return ratio
    raise UsageError(
        f"model.path: model_index.json gives {ratio!r:.40} as boundary_ratio, must be null or from 0 to 1; "
        "download it again"
    )
