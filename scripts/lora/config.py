"""Defines the configuration of LoRA training and of its data, and reads it from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from scripts.run.command_line import parse
from scripts.run.config import AnyModelConfig, MaskConfig
from scripts.run.errors import UsageError
from scripts.run.schema import Schema, TextLoader, key, listing

FAMILIES = ("wan", "hunyuan_video", "mochi")
SIZES = "data.sizes"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS_FORM = "layer names separated by commas, or a list of names"
SIZES_FORM = "FRAMESxHEIGHTxWIDTH separated by commas, or a list of [frames, height, width]"


def parse_sizes(value: Any) -> list[list[int]]:
    """Returns the entries of `data.sizes`: text as `129x64x64, 65x64x64`, or a list of such text or triples.

    Raises:
        UsageError: another form, a number that is not above 0, the same size twice.
    """
    sizes = [_size(entry) for entry in _entries(value)]
    if any(sizes.count(size) > 1 for size in sizes):
        raise UsageError(f"{SIZES}: got {value!r}, which has a size twice; give each size once")
    return sizes


def _entries(value: Any) -> list:
    if isinstance(value, str) and value.lstrip()[:1] != "[":
        return [part for part in value.split(",") if part.strip()]
    try:
        entries = yaml.load(value, TextLoader) if isinstance(value, str) else value
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, list):
        raise UsageError(f"{SIZES}: got {value!r}, must be {SIZES_FORM}")
    return [entries] if entries and all(str(number).isdecimal() for number in entries) else entries


def _size(entry: Any) -> list[int]:
    parts = entry.strip().split("x") if isinstance(entry, str) else entry
    texts = [str(part).strip() for part in parts] if isinstance(parts, Sequence) else []
    numbers = [int(text) if text.isdecimal() else 0 for text in texts]
    if len(numbers) != 3 or min(numbers) < 1:
        raise UsageError(f"{SIZES}: got {entry!r}, must be {SIZES_FORM}")
    return numbers


def parse_targets(value: Any) -> list[str]:
    """Returns the entries of `lora.targets`; UsageError for anything but names."""
    entries = value.strip("[] ").split(",") if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(name, str) and name.strip() for name in entries):
        raise UsageError(f"lora.targets: got {value!r}, must be {TARGETS_FORM}")
    return [name.strip() for name in entries]


@dataclass
class TrainModelConfig(AnyModelConfig):
    family: str = key("wan", "model family", FAMILIES)
    expert: int = key(
        1, "expert of Wan2.2 A14B to train: 1 takes the high noise levels, 2 the low ones", (1, 2)
    )


@dataclass
class TrainMaskConfig(MaskConfig):
    """Adds the option beyond the mask that needs no dense step, as training has none."""

    far_field: str = key(
        "none", "how a dropped block counts: not at all, or as its mean key and value", ("none", "mean")
    )


@dataclass
class DataConfig:
    folder: str | None = key(
        None, "folder of videos or images, each with its caption in a .txt of the same name; or use table"
    )
    table: str | None = key(
        None, ".jsonl or .csv with `video` and `caption`, paths relative to it; replaces folder"
    )
    latents: str = key("outputs/latents", "folder of latents, made by prepare_latents.sh")
    sizes: list[list[int]] = field(
        default_factory=list,
        metadata=listing(
            "sizes to train on: a video gets the longest that it has frames for, and of these the largest of "
            "about its shape that needs no enlarging; resized to cover it (Lanczos), centre-cropped",
            SIZES_FORM,
            parse_sizes,
        ),
    )
    fps: float | None = key(
        None,
        "take frames at this rate, the nearest in time; null: all frames, all videos must have one rate",
        low=0.0,
    )
    clips: int = key(1, "maximum of clips from a long video; they do not overlap, spread evenly", low=1)
    skip_bad: bool = key(
        False,
        "go on without videos that cannot be used; left_out.txt in latents lists them",
        (True, False),
    )
    shard_mb: int = key(512, "MiB of a file of latents; an interruption loses at most one file", low=1)


@dataclass
class LoraConfig:
    rank: int = key(128, "rank of the two matrices of a layer", low=1)
    alpha: float | None = key(None, "strength, divided by the rank; null: the rank", low=0.0)
    targets: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata=listing("layers of each self-attention to train", TARGETS_FORM, parse_targets),
    )
    dropout: float = key(0.0, "share of a layer's inputs that the adapter leaves out", share="0")


@dataclass
class TrainConfig:
    steps: int = key(2500, "number of updates", low=1)
    batch: int = key(1, "videos that a process takes at once", low=1)
    accumulate: int = key(1, "batches per update", low=1)
    rate: float = key(1e-4, "learning rate", low=0.0)
    schedule: str = key("cosine", "schedule of the learning rate after the warm-up", ("cosine", "constant"))
    warmup: int = key(100, "updates in which the learning rate rises", low=0)
    optimizer: str = key("adamw", "adamw8bit needs bitsandbytes and a GPU", ("adamw", "adamw8bit"))
    weight_decay: float = key(0.01, "weight decay of the optimizer; 0: none", share="0")
    clip: float = key(1.0, "largest norm of the gradient", low=0.0)
    ema: float = key(
        0.0, "decay of an exponential mean of the adapter, which is saved in its place; 0: none", share="0"
    )
    caption_dropout: float = key(0.1, "share of captions left out, for guidance; 0: none", share="0")
    timesteps: str = key(
        "logit_normal", "distribution of the noise levels before the shift", ("logit_normal", "uniform")
    )
    flow_shift: float = key(5.0, "shift of the noise levels towards noise", low=0.0)
    guidance: float = key(1.0, "guidance passed to a model that has it built in (HunyuanVideo)", low=0.0)
    checkpointing: bool = key(True, "recompute the activations of a block to save memory", (True, False))
    seed: int = key(0, "seed of all random numbers", low=0)
    save_every: int = key(100, "updates from one checkpoint to the next", low=1)
    most_skipped: int = key(10, "non-finite updates in a row after which one more ends the run", low=0)


@dataclass
class ValidationConfig:
    every: int = key(100, "updates from one validation to the next; 0: never", low=0)
    samples: int = key(8, "samples held out from training, spread evenly", low=1)
    levels: int = key(4, "noise levels of the validation loss, spread evenly", low=1)
    videos: int = key(0, "videos generated from held-out captions at every validation", low=0)
    steps: int = key(50, "denoising steps of these videos", low=1)
    guidance_scale: float = key(5.0, "guidance of these videos", low=1.0)


@dataclass
class RunConfig:
    path: str = key("outputs/lora", "folder of the adapter, its checkpoints and logs")
    keep: int = key(3, "number of newest checkpoints to keep", low=1)
    accept_changes: bool = key(False, "resume a run even if other keys differ", (True, False))


@dataclass
class SharedConfig:
    ulysses_degree: int = key(1, "processes that share the tokens of a video", low=1)
    shard: str = key(
        "none", "the model's weights: whole in every process, or fsdp: a part in each", ("none", "fsdp")
    )


@dataclass
class LoraTrainConfig:
    model: TrainModelConfig = field(default_factory=TrainModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attention: TrainMaskConfig = field(default_factory=TrainMaskConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    output: RunConfig = field(default_factory=RunConfig)
    parallel: SharedConfig = field(default_factory=SharedConfig)


ABSENT = dict.fromkeys(
    ("attention.selection", "attention.residual"), "training has no dense step to take it from; leave it out"
)
SCHEMA = Schema(LoraTrainConfig, presets="configs/train/*.yaml", absent=ABSENT)


def read_arguments(argv: list[str], call: str) -> tuple[LoraTrainConfig, bool] | None:
    """Returns the configuration, and whether `--dry-run` is given; or prints the help and returns None.

    Raises UsageError unless the arguments are one configuration, `key=value`, --dry-run and --help.
    """
    command = parse(argv, call, stands_in=False)
    if command.help:
        lines = [f"usage: {call}", "", "presets:", *SCHEMA.preset_lines(), "", *SCHEMA.help_lines()]
        print("\n".join(lines))
        return None
    if command.config_file is None:
        raise UsageError(f"a configuration is missing; usage: {call}")
    config = SCHEMA.read(command.config_file, command.overrides)
    SCHEMA.check(config)
    return config, command.dry_run
