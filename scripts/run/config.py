"""The configuration of a run: its keys and its help text. Defaults are those of the 14B preset."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import yaml

from scripts.run.errors import UsageError, nearest_key
from scripts.run.schema import ROOT, Schema, find_path, key, listing

__all__ = ["ROOT", "Config", "allowed", "find_path", "help_text", "keys", "read_config"]
FAMILIES = ("wan", "hunyuan_video", "mochi", "wan_i2v", "hunyuan_video_i2v", "wan_vace")
CALL = "bash scripts/wan_t2v_inference.sh [CONFIG.yaml] [key=value ...] [--dry-run] [--help]"


LORAS = "model.loras"
LORA_FORM = (
    "a file, folder or hub id, or a list of {path: ..., weight_name: ..., scale: 1.0, transformer: both}"
)
EXPERTS = ("both", "1", "2")


@dataclass
class LoraConfig:
    """`weight_name`: the file in a folder or on the hub; `transformer`: which of two, for Wan2.2 A14B."""

    path: str
    weight_name: str | None = None
    scale: float = 1.0
    transformer: str = "both"


def parse_loras(value: Any) -> list[dict[str, Any]]:
    """The entries of `model.loras`: nothing, one path or mapping, or a list of them, or one of these as text.

    Raises:
        UsageError: no such form, an unknown key, a value that is not allowed.
    """
    if isinstance(value, str):
        value = _from_text(value)
    value = [] if value is None else value
    entries = value if isinstance(value, list) else [value]
    return [_entry(f"{LORAS}[{number}]", entry) for number, entry in enumerate(entries)]


def _from_text(text: str) -> Any:
    """YAML where it begins with a bracket, else a path as it stands."""
    if text.strip() in ("", "null"):
        return None
    if text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{LORAS}: got {text!r}, allowed: {LORA_FORM}") from error


def _entry(place: str, entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, Mapping):
        raise UsageError(f"{place}: got {entry!r}, allowed: {LORA_FORM}")
    known = [key.name for key in fields(LoraConfig)]
    for name in entry:
        if name not in known:
            nearest = nearest_key(f"{place}.{name}", [f"{place}.{key}" for key in known])
            raise UsageError(f"unknown key '{place}.{name}'; did you mean {nearest!r}?")
    path, weight_name = entry.get("path"), entry.get("weight_name")
    if not isinstance(path, str) or not path.strip():
        raise UsageError(f"{place}.path: got {path!r}, allowed: a file, a folder, or a hub id owner/name")
    if weight_name is not None and (not isinstance(weight_name, str) or not weight_name.strip()):
        raise UsageError(f"{place}.weight_name: got {weight_name!r}, allowed: a file name, or null")
    return {
        "path": _literal(path),
        "weight_name": weight_name and _literal(weight_name),
        "scale": _scale(f"{place}.scale", entry.get("scale", 1.0)),
        "transformer": _expert(f"{place}.transformer", entry.get("transformer", "both")),
    }


def _literal(text: str) -> str:
    """No interpolation in a file's name."""
    return text.replace("${", "\\${")


def _scale(place: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{place}: got {value!r}, allowed: a number")
    return number


def _expert(place: str, value: Any) -> str:
    if isinstance(value, bool) or str(value) not in EXPERTS:
        raise UsageError(f"{place}: got {value!r}, allowed: {', '.join(EXPERTS)}")
    return str(value)


class VideoSize(NamedTuple):
    """Frames, height and width of a video, in pixels."""

    frames: int
    height: int
    width: int


@dataclass
class AnyModelConfig:
    """What generation and training ask of a model."""

    path: str = key("Wan-AI/Wan2.1-T2V-14B-Diffusers", "folder in diffusers format, or Hugging Face hub id")
    family: str = key("wan", "model family", FAMILIES)
    dtype: str = key(
        "bfloat16", "of all but the VAE, which stays float32", ("bfloat16", "float16", "float32")
    )
    device: str = key("auto", "auto takes CUDA where there is one", ("auto", "cpu", "cuda"))
    positions: str = key(
        "plain",
        "frequencies in time of a video longer than those of the training",
        ("plain", "riflex", "interpolate", "ntk", "yarn"),
    )
    positions_frames: int | None = key(
        None, "video frames of the training; null: Wan 81, HunyuanVideo 129, Mochi 163", low=1
    )


@dataclass
class ModelConfig(AnyModelConfig):
    """What generation asks beside."""

    loras: list[LoraConfig] = field(
        default_factory=list,
        metadata=listing("LoRAs of any usual key format, which add up", LORA_FORM, parse_loras),
    )
    lora_mode: str = key("separate", "apart from the weights, or added to them", ("separate", "fused"))
    lora_unmatched: str = key("error", "keys of a LoRA that the model has no place for", ("error", "warn"))
    offload: str = key(
        "none",
        "weights wait in host memory and come part by part, block by block, or layer by layer",
        ("none", "model", "group", "sequential"),
    )
    quantization: str = key(
        "none",
        "how the transformer's weights are kept; int8 needs torchao, nf4 bitsandbytes",
        ("none", "fp8", "int8", "nf4"),
    )
    vae_tiling: str = key(
        "auto", "decode tile by tile; auto: HunyuanVideo and Mochi do", ("auto", "always", "never")
    )
    compile: str = key("none", "torch.compile of the transformer's blocks", ("none", "blocks"))
    cache: str = key(
        "none", "take over from earlier steps", ("none", "first_block", "taylorseer", "mag", "pab")
    )
    cache_threshold: float = key(0.05, "change below which first_block and mag skip", low=0.0)
    cache_ratios: str | None = key(None, "of mag: numbers with commas, or calibrate, which prints them")


@dataclass
class MaskConfig:
    """What a mask is made of, and the kernels of sparse and of dense layers."""

    pattern: str = key(
        "radial",
        "which key blocks each query block sees; those after dense are to compare with, as dense as radial",
        ("radial", "dense", "spatial", "temporal", "sliding_tile", "strided", "harmonic", "power", "random"),
    )
    backend: str = key(
        "auto",
        "kernel of the sparse attention",
        ("auto", "reference", "cpp", "blocks", "flex", "triton", "flashinfer", "sage"),
    )
    block_size: int = key(128, "tokens per block", (16, 32, 64, 128, 256))
    density: float | None = key(
        None,
        "share of the token pairs; solves for decay_factor, then neighbour, decimation_width, sink",
        share="null",
    )
    decay_factor: float = key(0.2, "scales the window's width from frame distance 2 on", low=0.0)
    neighbour: int | float | str = key(
        "half",
        "window at frame distance 1, each way: whole frame, half or another share",
        words=("full", "half"),
        share="full, half",
    )
    sink: bool = key(True, "every query sees the first frame", (True, False))
    decimation_width: int | str = key(
        128, "windows narrower than this skip frames; 'block': block_size", words=("block",)
    )
    dense_layers: int = key(1, "transformer layers at the start with dense attention", low=0)
    dense_backend: str = key(
        "auto", "kernel of dense attention: auto, native, sage, or one of diffusers, as flash, _native_cudnn"
    )


@dataclass
class AttentionConfig(MaskConfig):
    """The same in a run of denoising steps."""

    quantize: str = key("none", "8-bit products where the backend has them", ("none", "int8", "fp8"))
    dense_steps: int = key(12, "denoising steps at the start with dense attention", low=0)
    dense_last_steps: int = key(0, "denoising steps at the end with dense attention", low=0)
    check: str = key(
        "auto",
        "stop at attention that is not finite (nan) or also compare it (reference); auto: nan if quantised",
        ("auto", "off", "nan", "reference"),
    )


@dataclass
class GenerationConfig:
    prompt: str = key("A cat walks on the grass, realistic", "what the video shows")
    prompt_file: str | None = key(None, "text file, one video a line; takes the place of prompt")
    image: str | None = key(
        None,
        "jpg or png that image to video starts from, for all prompts; turned by EXIF, over black where "
        "transparent, scaled to cover height x width (Lanczos), cropped at the centre",
    )
    video: str | None = key(
        None, "VACE: mp4, gif or folder of images to go by; its first num_frames frames, each fitted as image"
    )
    mask: str | None = key(
        None, "VACE: what of video is made anew (white) or kept (black), as many frames; null: all anew"
    )
    negative_prompt: str = key("", "what guidance moves away from")
    height: int = key(768, "pixels", low=1)
    width: int = key(1280, "pixels", low=1)
    num_frames: int = key(69, "video frames: 4k + 1, of Mochi 6k + 1", low=1)
    steps: int = key(50, "denoising steps", low=1)
    guidance_scale: float = key(5.0, "classifier-free guidance; 1: none, in half the time", low=1.0)
    guidance_scale_2: float | None = key(None, "of Wan2.2's second expert; null: the same", low=1.0)
    flow_shift: float | None = key(
        5.0, "shift of the flow schedule towards noise; null: the model's", low=0.0
    )
    prompt_template: str = key("default", "plain: HunyuanVideo's prompt as it stands", ("default", "plain"))
    seed: int = key(0, "of the initial noise", low=0)

    @property
    def size(self) -> VideoSize:
        """Frames, height and width of the video."""
        return VideoSize(self.num_frames, self.height, self.width)


@dataclass
class OutputConfig:
    path: str = key("outputs", "folder, or a file name ending in .mp4; relative to the current directory")
    fps: int = key(16, "frames per second of the file", low=1)


@dataclass
class ParallelConfig:
    ulysses_degree: int | None = key(
        None, "processes that share tokens and heads; null: as many as fit", low=1
    )
    ring_degree: int | None = key(
        None, "processes that share tokens beyond the heads; null: 1 unless only it makes degrees fit", low=1
    )
    cfg_degree: int | None = key(
        None, "processes that share the halves of guidance; null: 2 if it can", low=1
    )
    data_degree: int | None = key(None, "processes that share the prompts of a file; null: the rest", low=1)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


SCHEMA = Schema(Config)


def keys() -> dict[str, Any]:
    """Dotted key -> dataclass field, in the order of the schema."""
    return SCHEMA.keys()


def allowed(name: str) -> str:
    """What a key takes, in words."""
    return SCHEMA.allowed(name)


def read_config(config_file: str, overrides: list[str]) -> Config:
    """The resolved configuration; arguments and errors as of `Schema.read`."""
    return SCHEMA.read(config_file, overrides)


def help_text() -> str:
    """Call form, presets, and every key with its default and meaning."""
    presets = "presets (without one: the script's own where a GPU has room for it, else a bundled model's):"
    usage = f"usage: {CALL}, and likewise every scripts/*_inference.sh"
    return "\n".join([usage, "", presets, *SCHEMA.preset_lines(), "", *SCHEMA.help_lines()])
