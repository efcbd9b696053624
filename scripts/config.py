"""The configuration of a run: its schema, its reading from YAML and `key=value`, and its help text.

Precedence, lowest first: the defaults below (those of the 14B preset), the YAML file, the command line.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.errors import UsageError, nearest_key, one_line
from scripts.lora_options import FORM, LORAS, LoraConfig, parse_loras

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("wan", "hunyuan_video", "mochi", "wan_i2v", "hunyuan_video_i2v", "wan_vace")
WORDS = {"attention.decimation_width": ("block",), "attention.neighbour": ("full", "half")}
SHARES = {"attention.density": "null", "attention.neighbour": "full, half"}
CALL = "bash scripts/wan_t2v_inference.sh [CONFIG.yaml] [key=value ...] [--dry-run] [--help]"


def _key(default: Any, help: str, choices: tuple = (), low: float | None = None) -> Any:
    """A configuration key: default, one-line meaning, allowed values or smallest allowed number."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low})


@dataclass
class ModelConfig:
    path: str = _key("Wan-AI/Wan2.1-T2V-14B-Diffusers", "folder in diffusers format, or Hugging Face hub id")
    family: str = _key("wan", "model family", FAMILIES)
    dtype: str = _key(
        "bfloat16", "of all but the VAE, which stays float32", ("bfloat16", "float16", "float32")
    )
    device: str = _key("auto", "auto takes CUDA where there is one", ("auto", "cpu", "cuda"))
    loras: list[LoraConfig] = field(
        default_factory=list,
        metadata={"help": "LoRAs of any usual key format, which add up", "choices": (), "low": None},
    )
    lora_mode: str = _key("separate", "apart from the weights, or added to them", ("separate", "fused"))
    lora_unmatched: str = _key("error", "keys of a LoRA that the model has no place for", ("error", "warn"))
    offload: str = _key(
        "none",
        "weights wait in host memory and come part by part, block by block, or layer by layer",
        ("none", "model", "group", "sequential"),
    )
    quantization: str = _key(
        "none",
        "how the transformer's weights are kept; int8 needs torchao, nf4 bitsandbytes",
        ("none", "fp8", "int8", "nf4"),
    )
    vae_tiling: str = _key(
        "auto", "decode tile by tile; auto: HunyuanVideo and Mochi do", ("auto", "always", "never")
    )
    compile: str = _key("none", "torch.compile of the transformer's blocks", ("none", "blocks"))
    cache: str = _key(
        "none", "take over from earlier steps", ("none", "first_block", "taylorseer", "mag", "pab")
    )
    cache_threshold: float = _key(0.05, "change below which first_block and mag skip", low=0.0)
    cache_ratios: str | None = _key(None, "of mag: numbers with commas, or calibrate, which prints them")


@dataclass
class AttentionConfig:
    pattern: str = _key("radial", "which key blocks each query block sees", ("radial", "dense"))
    backend: str = _key(
        "auto",
        "kernel of the sparse attention",
        ("auto", "reference", "blocks", "flex", "triton", "flashinfer", "sage"),
    )
    quantize: str = _key("none", "8-bit products where the backend has them", ("none", "int8", "fp8"))
    block_size: int = _key(128, "tokens per block", (16, 32, 64, 128, 256))
    density: float | None = _key(
        None, "share of the token pairs; solves for decay_factor, then neighbour, decimation_width, sink"
    )
    decay_factor: float = _key(0.2, "scales the window's width from frame distance 2 on", low=0.0)
    neighbour: int | float | str = _key(
        "half", "window at frame distance 1, each way: whole frame, half or another share"
    )
    sink: bool = _key(True, "every query sees the first frame", (True, False))
    decimation_width: int | str = _key(128, "windows narrower than this skip frames; 'block': block_size")
    dense_steps: int = _key(12, "denoising steps at the start with dense attention", low=0)
    dense_layers: int = _key(1, "transformer layers at the start with dense attention", low=0)
    dense_last_steps: int = _key(0, "denoising steps at the end with dense attention", low=0)
    dense_backend: str = _key(
        "auto", "kernel of dense attention: auto, native, sage, or one of diffusers, as flash, _native_cudnn"
    )
    check: str = _key(
        "auto",
        "stop at attention that is not finite (nan) or also compare it (reference); auto: nan if quantised",
        ("auto", "off", "nan", "reference"),
    )


@dataclass
class GenerationConfig:
    prompt: str = _key("A cat walks on the grass, realistic", "what the video shows")
    prompt_file: str | None = _key(None, "text file, one video a line; takes the place of prompt")
    image: str | None = _key(
        None,
        "jpg or png that image to video starts from, for all prompts; turned by EXIF, over black where "
        "transparent, scaled to cover height x width (Lanczos), cropped at the centre",
    )
    video: str | None = _key(
        None, "VACE: mp4, gif or folder of images to go by; its first num_frames frames, each fitted as image"
    )
    mask: str | None = _key(
        None, "VACE: what of video is made anew (white) or kept (black), as many frames; null: all anew"
    )
    negative_prompt: str = _key("", "what guidance moves away from")
    height: int = _key(768, "pixels", low=1)
    width: int = _key(1280, "pixels", low=1)
    num_frames: int = _key(69, "video frames, 4k + 1", low=1)
    steps: int = _key(50, "denoising steps", low=1)
    guidance_scale: float = _key(5.0, "classifier-free guidance; 1: none, in half the time", low=1.0)
    guidance_scale_2: float | None = _key(None, "of Wan2.2's second expert; null: the same", low=1.0)
    flow_shift: float | None = _key(
        5.0, "shift of the flow schedule towards noise; null: the model's", low=0.0
    )
    prompt_template: str = _key("default", "plain: HunyuanVideo's prompt as it stands", ("default", "plain"))
    seed: int = _key(0, "of the initial noise", low=0)


@dataclass
class OutputConfig:
    path: str = _key("outputs", "folder, or a file name ending in .mp4; relative to the current directory")
    fps: int = _key(16, "frames per second of the file", low=1)


@dataclass
class ParallelConfig:
    ulysses_degree: int | None = _key(
        None, "processes that share tokens and heads; null: as many as fit", low=1
    )
    ring_degree: int = _key(1, "processes that share queries beyond the heads; not built yet", (1,))
    cfg_degree: int | None = _key(
        None, "processes that share the halves of guidance; null: 2 if it can", low=1
    )
    data_degree: int | None = _key(None, "processes that share the prompts of a file; null: the rest", low=1)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def keys() -> dict[str, Any]:
    """Dotted key -> dataclass field, in the order of the schema."""
    groups = ((group.name, group.default_factory) for group in fields(Config))
    return {f"{name}.{key.name}": key for name, group in groups for key in fields(group)}


def find_path(name: str) -> Path:
    """`name` from the current directory, or from the repository root where it is not found there."""
    path = Path(name).expanduser()
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path


def read_config(config_file: str, overrides: list[str]) -> Config:
    """The resolved configuration.

    Args:
        config_file: YAML file, relative to the current directory or the repository root.
        overrides: `group.key=value` strings; text is taken as it stands, but `null` is none where it may be.

    Raises:
        UsageError: file missing or unreadable, unknown key, value of the wrong type.
    """
    config = OmegaConf.structured(Config)
    _update(config, _read_yaml(config_file), source=config_file)
    _update(config, _read_overrides(overrides), source="command line")
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(f"{config_file}: {one_line(error)}") from error


def _read_yaml(config_file: str) -> dict[str, dict]:
    path = find_path(config_file)
    if not path.is_file():
        names = ", ".join(f"configs/{preset.name}" for preset in sorted((ROOT / "configs").glob("*.yaml")))
        raise UsageError(f"config file {config_file!r} not found; bundled ones: {names}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"config file {config_file!r} cannot be read as YAML: {reason}") from error
    content = content if isinstance(content, dict) else {str(content): None}
    for group, values in content.items():
        if not isinstance(values, dict):
            groups = ", ".join(group.name for group in fields(Config))
            nearest = nearest_key(str(group), keys())
            raise UsageError(
                f"config file {config_file!r}: {group!r} is no group with keys; allowed: {groups}; "
                f"did you mean {nearest!r}?"
            )
    return content


def _read_overrides(overrides: list[str]) -> dict[str, dict]:
    content: dict[str, dict] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        group, _, name = key.partition(".")
        content.setdefault(group, {})[name] = _parse_value(key, value)
    return content


def _parse_value(key: str, value: str) -> Any:
    """The value by its key's type: text as it stands (no YAML, no interpolation), numbers in decimal."""
    kind = keys()[key].type if key in keys() else str
    if kind in (str | None, float | None, int | None) and value == "null":
        return None
    if key == LORAS:
        return value
    if kind in (str, str | None) or value in WORDS.get(key, ()):
        return value.replace("${", "\\${")
    try:
        numbers = dict.fromkeys((float, float | None, int | float | str), float)
        return {bool: yaml.safe_load, **numbers}.get(kind, int)(value)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{key}: got {value!r}, allowed: {allowed(key)}") from error


def _update(config: DictConfig, content: dict[str, dict], source: str) -> None:
    known = keys()
    for group, values in content.items():
        for name, value in values.items():
            key = f"{group}.{name}" if name else str(group)
            if key not in known:
                raise UsageError(f"unknown key {key!r} ({source}); did you mean {nearest_key(key, known)!r}?")
            try:
                OmegaConf.update(config, key, parse_loras(value) if key == LORAS else value)
            except OmegaConfBaseException as error:
                raise UsageError(f"{key}: got {value!r}, allowed: {allowed(key)}") from error


def allowed(key: str) -> str:
    """What a key takes, in words."""
    entry = keys()[key]
    choices, low = entry.metadata["choices"], entry.metadata["low"]
    if choices:
        return ", ".join(_shown(choice) for choice in choices)
    if key == LORAS:
        return FORM
    if key in SHARES:
        return f"{SHARES[key]}, or a number above 0 up to 1"
    kind = {
        int: "whole number",
        int | None: "whole number",
        float: "number",
        float | None: "number",
        int | str: "positive whole number or 'block'",
    }
    text = kind.get(entry.type, "text")
    above = "above" if entry.type in (float, float | None) and low == 0 else "of at least"
    text = text if low is None else f"{text} {above} {low:g}"
    return f"{text}, or null" if entry.type in (float | None, int | None) else text


def help_text() -> str:
    """Call form, presets, and every key with its default and meaning."""
    lines = [
        f"usage: {CALL}, and likewise every scripts/*_inference.sh",
        "",
        "presets (without one: the script's own where a GPU has room for it, else a bundled model's):",
    ]
    for preset in sorted((ROOT / "configs").glob("*.yaml")):
        expectation = preset.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        lines.append(f"  configs/{preset.name:<22} {expectation}")
    lines += ["", "keys (default; what it means; what is allowed):"]
    for key, entry in keys().items():
        detail = f"{entry.metadata['help']} [{allowed(key)}]"
        lines.append(f"  {f'{key}={_shown(entry.default)}':<45} {detail}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A default as it is written on the command line."""
    if value is MISSING:
        return "[]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"
