"""The configuration of LoRA training and of its data: keys and help text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from scripts.run.config import AnyModelConfig, MaskConfig
from scripts.run.errors import UsageError
from scripts.run.schema import Schema, key, listing

FAMILIES = ("wan", "hunyuan_video", "mochi")
SIZES = "data.sizes"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS_FORM = "names of layers with commas between them, or a list of names"
SIZES_FORM = "FRAMESxHEIGHTxWIDTH with commas between them, or a list of [frames, height, width]"


def parse_sizes(value: Any) -> list[list[int]]:
    """The entries of `data.sizes`: text as `129x64x64, 65x64x64`, or a list of such text or of three numbers.

    Raises:
        UsageError: no such form, a number that is not above 0, the same size twice.
    """
    entries = _entries(value)
    sizes = [_size(entry) for entry in entries]
    if [size for size in sizes if sizes.count(size) > 1]:
        raise UsageError(f"{SIZES}: got {value!r} with a size twice, allowed: {SIZES_FORM}, each once")
    return sizes


def _entries(value: Any) -> list:
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        return [part for part in value.split(",") if part.strip()]
    try:
        value = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise UsageError(f"{SIZES}: got {value!r}, allowed: {SIZES_FORM}") from error
    one = isinstance(value, list) and value and all(isinstance(number, int) for number in value)
    entries = [value] if one else value
    if not isinstance(entries, list):
        raise UsageError(f"{SIZES}: got {value!r}, allowed: {SIZES_FORM}")
    return entries


def _size(entry: Any) -> list[int]:
    parts = entry.strip().split("x") if isinstance(entry, str) else entry
    numbers = [_number(part) for part in parts] if isinstance(parts, Sequence) else []
    if len(numbers) != 3 or min(numbers) < 1:
        raise UsageError(f"{SIZES}: got {entry!r}, allowed: {SIZES_FORM}")
    return numbers


def _number(part: Any) -> int:
    """A whole number; 0, which no size is, for anything else."""
    text = str(part).strip()
    return int(text) if text.isdecimal() else 0


def parse_targets(value: Any) -> list[str]:
    """The entries of `lora.targets`; UsageError for anything but names."""
    entries = value.strip("[] ").split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(name, str) and name.strip() for name in entries):
        raise UsageError(f"lora.targets: got {value!r}, allowed: {TARGETS_FORM}")
    return [name.strip() for name in entries]


@dataclass
class TrainModelConfig(AnyModelConfig):
    family: str = key("wan", "model family", FAMILIES)
    expert: int = key(1, "of Wan2.2 A14B: 1 is trained on the high noise levels, 2 on the low ones", (1, 2))


@dataclass
class DataConfig:
    folder: str | None = key(None, "videos, each with its caption in a .txt beside it; or table")
    table: str | None = key(
        None, ".jsonl or .csv with `video` and `caption`, paths relative to it; in place of folder"
    )
    latents: str = key("outputs/latents", "folder of what prepare_latents.sh makes of them")
    sizes: list[list[int]] = field(
        default_factory=list,
        metadata=listing(
            "what is trained on: a video goes to the longest it has the frames for, of these to the largest "
            "of about its shape that needs no enlarging; scaled to cover (Lanczos), cropped at the centre",
            SIZES_FORM,
            parse_sizes,
        ),
    )
    fps: float | None = key(
        None,
        "frames are taken at this rate, the nearest in time; null: all, and all videos share a rate",
        low=0.0,
    )
    clips: int = key(1, "clips of a long video at most, which do not overlap, spread evenly", low=1)
    shard_mb: int = key(512, "MiB of a file of latents, which is what a stop loses at most", low=1)


@dataclass
class LoraConfig:
    rank: int = key(128, "of the two matrices of a layer", low=1)
    alpha: float | None = key(None, "strength, over the rank; null: the rank", low=0.0)
    targets: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata=listing("layers of each self-attention", TARGETS_FORM, parse_targets),
    )
    dropout: float = key(0.0, "share of a layer's inputs to the adapter that are left out", share="0")


@dataclass
class TrainConfig:
    steps: int = key(2500, "updates", low=1)
    batch: int = key(1, "videos of a process at once", low=1)
    accumulate: int = key(1, "batches of an update", low=1)
    rate: float = key(1e-4, "learning rate", low=0.0)
    schedule: str = key("cosine", "of the learning rate, after the warm-up", ("cosine", "constant"))
    warmup: int = key(100, "updates in which the learning rate rises", low=0)
    optimizer: str = key("adamw", "adamw8bit needs bitsandbytes and a GPU", ("adamw", "adamw8bit"))
    weight_decay: float = key(0.01, "of the optimizer; 0: none", share="0")
    clip: float = key(1.0, "largest norm of the gradient", low=0.0)
    ema: float = key(
        0.0, "decay of an exponential mean of the adapter, which is saved then; 0: none", share="0"
    )
    caption_dropout: float = key(0.1, "how often a caption is left out, for guidance; 0: never", share="0")
    timesteps: str = key(
        "logit_normal", "distribution of the noise levels before the shift", ("logit_normal", "uniform")
    )
    flow_shift: float = key(5.0, "shift of the noise levels towards noise", low=0.0)
    guidance: float = key(1.0, "told to a model that has its guidance built in (HunyuanVideo)", low=0.0)
    checkpointing: bool = key(True, "activations of a block are computed again, not kept", (True, False))
    seed: int = key(0, "of all that is drawn", low=0)
    save_every: int = key(100, "updates from one checkpoint to the next", low=1)
    most_skipped: int = key(10, "updates in a row with numbers that are not finite, then the run ends", low=0)


@dataclass
class ValidationConfig:
    every: int = key(100, "updates; 0: never", low=0)
    samples: int = key(8, "of the data, which are not trained on, spread evenly", low=1)
    levels: int = key(4, "noise levels at which their loss is taken, spread evenly", low=1)
    videos: int = key(0, "generated from their captions at every validation", low=0)
    steps: int = key(50, "denoising steps of these videos", low=1)
    guidance_scale: float = key(5.0, "of these videos", low=1.0)


@dataclass
class RunConfig:
    path: str = key("outputs/lora", "folder of the adapter, its checkpoints and logs")
    keep: int = key(3, "checkpoints that are kept, the newest", low=1)
    accept_changes: bool = key(False, "go on with a run although other keys differ", (True, False))


@dataclass
class SharedConfig:
    ulysses_degree: int = key(1, "processes that share the tokens of a video", low=1)
    shard: str = key(
        "none",
        "the model's weights: whole in every process, or fsdp, a part in each of them",
        ("none", "fsdp"),
    )


@dataclass
class LoraTrainConfig:
    model: TrainModelConfig = field(default_factory=TrainModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attention: MaskConfig = field(default_factory=MaskConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: RunConfig = field(default_factory=RunConfig)
    parallel: SharedConfig = field(default_factory=SharedConfig)


SCHEMA = Schema(LoraTrainConfig, presets="configs/train/*.yaml")
