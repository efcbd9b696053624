"""Defines the configuration of a run: its keys and its help text. The defaults match the 14B preset."""

from dataclasses import dataclass, field
from typing import NamedTuple

from radial_attn.chooser import TUNES
from radial_attn.kernels.contract import FAR_FIELDS
from radial_attn.models.pipeline.families import FAMILIES
from radial_attn.models.runtime.schedule import (
    DENSE_STEPS_FORM,
    DENSITY_FORM,
    read_dense_steps,
    read_density,
)
from radial_attn.residual import MEMORIES, RESIDUALS
from radial_attn.selection import BUDGETS, SELECTIONS
from scripts.run.errors import UsageError
from scripts.run.schema import ROOT, Schema, find_path, key, listing
from scripts.run.values import (
    LORA_FORM,
    NAMES_FORM,
    NUMBERS_FORM,
    LoraConfig,
    in_words,
    numbers,
    parse_loras,
    parse_names,
)

__all__ = ["ROOT", "Config", "find_path", "help_text", "keys", "read_config"]
CALL = "bash scripts/wan_t2v_inference.sh [CONFIG.yaml] [key=value ...] [--dry-run] [--help]"


class VideoSize(NamedTuple):
    """Holds frames, height and width of a video; height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass
class AnyModelConfig:
    """Holds the options of a model that generation and training share."""

    path: str = key("Wan-AI/Wan2.1-T2V-14B-Diffusers", "folder in diffusers format, or Hugging Face hub id")
    family: str = key("wan", "model family", tuple(FAMILIES))
    dtype: str = key(
        "bfloat16",
        "data type of all parts but the VAE, which stays float32",
        ("bfloat16", "float16", "float32"),
    )
    device: str = key("auto", "auto: CUDA if there is a GPU, else the CPU", ("auto", "cpu", "cuda"))
    positions: str = key(
        "plain",
        "scaling of the rotary frequencies in time, for a video longer than the training videos",
        ("plain", "riflex", "interpolate", "ntk", "yarn"),
    )
    positions_frames: int | None = key(
        None, "frames of a training video; null: Wan 81, HunyuanVideo 129, Mochi 163", low=1
    )


@dataclass
class ModelConfig(AnyModelConfig):
    """Adds the options of a model that only generation has."""

    transformer: str | None = key(
        None,
        "file with the transformer's weights, in place of its folder: safetensors as ComfyUI and the authors "
        "keep them, or GGUF; all else comes from path",
    )
    transformer_2: str | None = key(None, "the same for Wan2.2's second expert")
    controlnet: str | None = key(
        None,
        "Cosmos Transfer: what the controls show, for the control net of the hub model; null: edge, or the "
        "folder controlnet in path",
        (None, "edge", "depth", "seg", "blur"),
    )
    loras: list[LoraConfig] = field(
        default_factory=list,
        metadata=listing("LoRAs to add up, in any usual key format", LORA_FORM, parse_loras),
    )
    lora_mode: str = key(
        "separate", "keep LoRAs separate from the weights, or add them to the weights", ("separate", "fused")
    )
    lora_unmatched: str = key(
        "error", "reaction to LoRA keys that match nothing in the model", ("error", "warn")
    )
    offload: str = key(
        "none",
        "keep weights in host memory; load them part by part, block by block, or layer by layer",
        ("none", "model", "group", "sequential"),
    )
    quantization: str = key(
        "none",
        "storage of the transformer's weights; int8 needs torchao, nf4 needs bitsandbytes",
        ("none", "fp8", "int8", "nf4"),
    )
    vae_tiling: str = key(
        "auto", "decode tile by tile; auto: only for HunyuanVideo and Mochi", ("auto", "always", "never")
    )
    compile: str = key("none", "compile the transformer's blocks with torch.compile", ("none", "blocks"))
    cache: str = key(
        "none", "reuse results of earlier steps", ("none", "first_block", "taylorseer", "mag", "pab")
    )
    cache_threshold: float = key(0.05, "first_block and mag skip changes below this", low=0.0)
    cache_ratios: str | None = key(
        None, "ratios for mag, separated by commas, or calibrate, which measures and prints them"
    )


@dataclass
class MaskConfig:
    """Holds the options of a mask, and the kernels of sparse and dense layers."""

    pattern: str = key(
        "radial",
        "which key blocks each query block sees; those after dense are for comparison, as dense as radial",
        ("radial", "dense", "spatial", "temporal", "sliding_tile", "strided", "harmonic", "power", "random"),
    )
    backend: str = key(
        "auto",
        "kernel of sparse attention",
        ("auto", "reference", "cpp", "blocks", "flex", "triton", "flash4", "flashinfer", "sage"),
    )
    block_size: int = key(128, "tokens per block", (16, 32, 64, 128, 256))
    density: float | None = key(
        None,
        "share of token pairs to keep; solves for decay_factor, then neighbour, decimation_width, sink",
        share="null",
    )
    decay_factor: float = key(0.2, "scales the window's width at frame distances of 2 or more", low=0.0)
    neighbour: int | float | str = key(
        "half",
        "window at frame distance 1, each way: the full frame, half, or another share",
        words=("full", "half"),
        share="full, half",
    )
    sink: bool = key(True, "every query sees the first frame", (True, False))
    decimation_width: int | str = key(
        128, "windows narrower than this skip frames; 'block': block_size", words=("block",)
    )
    compat: str = key(
        "none",
        "whose mask to make; a published program fixes sink, neighbour and decimation_width, and takes no "
        "density",
        ("none", "authors-2025-06", "authors-2025-11", "kijai", "woct0rdho", "lightx2v"),
        replaces=("attention.sink", "attention.neighbour", "attention.decimation_width"),
    )
    dense_layers: int = key(1, "number of first layers with dense attention", low=0)
    dense_backend: str = key(
        "auto",
        "kernel of dense attention: auto, native, sage, flash4, or one of diffusers such as _native_cudnn",
    )
    tune: str = key(
        "auto",
        "how backend=auto chooses: off: by a fixed order; always: measures in every run; once: measures "
        "again only if a version, the GPU or a shape changes; auto: once on a GPU, else off",
        TUNES,
    )


@dataclass
class AttentionConfig(MaskConfig):
    """Adds the options of a run of denoising steps."""

    density: float | str | None = key(
        None,
        "share of token pairs to keep; a static mask solves for decay_factor, then neighbour, "
        "decimation_width, sink; with start and end it changes from the first sparse step to the last",
        form=f"null, {DENSITY_FORM}",
        parse=in_words("attention.density", f"null, {DENSITY_FORM}", read_density),
    )
    selection: str = key(
        "static",
        "static: one mask for all heads; dense_step: each head keeps the blocks that it needed most at the "
        "last dense step; profile: in the videos of a profile, so that no step must be dense",
        SELECTIONS,
    )
    profile: str | None = key(None, "file of scripts/calibrate.sh, for selection=profile")
    budget: str = key("layer", "who shares the number of chosen blocks", BUDGETS)
    far_field: str = key(
        "none",
        "how a dropped block counts: not at all, as its mean key and value, or with a first-order term",
        FAR_FIELDS,
    )
    residual: str = key(
        "none",
        "how the difference to the last dense output is kept and added: not at all, as means of blocks, or "
        "in 8 or 4 bits; output: that output itself, with no attention at sparse steps, as a control",
        RESIDUALS,
    )
    residual_memory: str = key(
        "device", "where the residual is kept: on the GPU, or in pinned memory of the host", MEMORIES
    )
    quantize: str = key("none", "8-bit products, for backends that have them", ("none", "int8", "fp8"))
    dense_steps: int | str = key(
        12,
        "denoising steps with dense attention: the first ones, or a list",
        form=DENSE_STEPS_FORM,
        parse=in_words("attention.dense_steps", DENSE_STEPS_FORM, read_dense_steps),
    )
    dense_last_steps: int = key(0, "number of last denoising steps with dense attention", low=0)
    check: str = key(
        "auto",
        "nan: stop at non-finite attention; reference: also compare with it; auto: nan if quantised",
        ("auto", "off", "nan", "reference"),
    )


@dataclass
class GenerationConfig:
    prompt: str = key("A cat walks on the grass, realistic", "text that the video shows")
    prompt_file: str | None = key(
        None, "text file with one prompt per line; lines that begin with # are comments; replaces prompt"
    )
    image: str | None = key(
        None,
        "image that image to video starts from, one for all prompts; rotated by EXIF, composited on "
        "black, resized to cover height x width (Lanczos), centre-cropped",
    )
    last_image: str | None = key(
        None,
        "image that the video ends with, read like image; Wan2.1-FLF2V needs it, Wan2.2-I2V-A14B takes it",
    )
    video: str | None = key(
        None,
        "VACE: video or folder of images that controls the video; the first num_frames frames, each "
        "resized and cropped like image; Wan-Animate: video in which a person is replaced; Cosmos Transfer: "
        "the controls, edges or the like",
    )
    mask: str | None = key(
        None,
        "VACE: parts of video to generate (white) or keep (black), with as many frames; null: generate all; "
        "Wan-Animate needs it with video",
    )
    pose_video: str | None = key(
        None, "Wan-Animate: video or folder of images of the poses to take, with as many frames as face_video"
    )
    face_video: str | None = key(
        None, "Wan-Animate: video or folder of images of the face to follow, cropped to squares"
    )
    reference_images: list[str] = field(
        default_factory=list,
        metadata=listing(
            "VACE: images of what the video shows, each resized to fit into height x width, on white",
            NAMES_FORM,
            parse_names,
        ),
    )
    negative_prompt: str = key(
        "", "text that guidance moves away from; HunyuanVideo: with true_cfg_scale above 1"
    )
    height: int = key(768, "pixels", low=1)
    width: int = key(1280, "pixels", low=1)
    num_frames: int = key(69, "video frames: 4k + 1; Mochi 6k + 1, LTX 8k + 1, MiniMax-H3 17k + 5", low=1)
    segment_frames: int | None = key(
        None,
        "Wan-Animate, Cosmos Transfer, SkyReels-V2's diffusion forcing: frames of a segment, 4k + 1; a "
        "longer video is made in segments, each from the last frame, or 17, of the one before; null: all "
        "at once",
        low=5,
    )
    steps: int = key(50, "denoising steps", low=1)
    guidance_scale: float = key(5.0, "classifier-free guidance; 1: none, in half the time", low=1.0)
    guidance_scale_2: float | None = key(
        None, "guidance of Wan2.2's second expert; null: same as guidance_scale", low=1.0
    )
    true_cfg_scale: float = key(
        1.0,
        "HunyuanVideo: guidance away from negative_prompt, on top of its own; 1: none, in half the time",
        low=1.0,
    )
    stg_scale: float | None = key(
        None, "LTX-2.3: guidance away from a pass that skips an attention; null: none, a pass less", low=0.0
    )
    modality_scale: float = key(
        1.0, "LTX-2: guidance away from a pass without its sound; 1: none, a pass less", low=1.0
    )
    flow_shift: float | None = key(
        5.0, "shift of the flow schedule towards noise; null: the model's own", low=0.0
    )
    prompt_template: str = key(
        "default", "plain: HunyuanVideo's prompt without a template", ("default", "plain")
    )
    seed: int = key(0, "seed of the initial noise", low=0)
    seeds: list[int] = field(
        default_factory=list,
        metadata=listing(
            "make each prompt with each of these seeds; none: with seed alone",
            NUMBERS_FORM,
            numbers("generation.seeds"),
        ),
    )

    @property
    def all_seeds(self) -> list[int]:
        """Returns the seeds of each prompt."""
        return self.seeds or [self.seed]

    @property
    def size(self) -> VideoSize:
        """Returns frames, height and width of what is denoised at once: the video, or a segment of it."""
        frames = min(self.num_frames, self.segment_frames or self.num_frames)
        return VideoSize(frames, self.height, self.width)


@dataclass
class OutputConfig:
    path: str = key("outputs", "folder, or a file name ending in .mp4; relative to the current directory")
    fps: int = key(16, "frames per second of the file", low=1)
    overwrite: bool = key(
        False, "replace a video that was made with other settings; false: refuse the run", (True, False)
    )


@dataclass
class ParallelConfig:
    ulysses_degree: int | None = key(
        None, "processes that share tokens and heads; null: as many as fit", low=1
    )
    ring_degree: int | None = key(
        None, "processes that share tokens beyond the heads; null: 1, or more if nothing else fits", low=1
    )
    cfg_degree: int | None = key(
        None, "processes that share the halves of guidance; null: 2 if possible", low=1
    )
    data_degree: int | None = key(None, "processes that share the videos of a run; null: the rest", low=1)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


SCHEMA = Schema(Config)
keys = SCHEMA.keys


def read_config(config_file: str, overrides: list[str]) -> Config:
    """Returns the resolved configuration; see `Schema.read` for arguments and errors."""
    return SCHEMA.read(config_file, overrides)


def read_one_seed(config_file: str, overrides: list[str]) -> Config:
    """Returns the configuration of a command that counts seeds itself; UsageError for several seeds."""
    config = read_config(config_file, overrides)
    if config.generation.seeds:
        raise UsageError(
            f"generation.seeds: got {config.generation.seeds}, but this command counts on from one; set "
            "generation.seed instead"
        )
    return config


def help_text() -> str:
    """Returns the call form, the presets, and every key with its default and meaning."""
    presets = "presets (default: the script's own if a GPU has room for it, else that of a bundled model):"
    usage = f"usage: {CALL}; every scripts/*_inference.sh takes the same arguments"
    return "\n".join([usage, "", presets, *SCHEMA.preset_lines(), "", *SCHEMA.help_lines()])
