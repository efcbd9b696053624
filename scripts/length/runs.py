"""Defines the runs of the length study: how each trains and generates, and its results."""

from dataclasses import dataclass
from pathlib import Path

from radial_attn.models.training.adapter import FILE
from scripts.lora.config import SCHEMA as TRAINING
from scripts.lora.config import LoraTrainConfig
from scripts.run.config import Config, read_one_seed
from scripts.toyworld import all_attributes
from scripts.toyworld.render import Attributes
from scripts.toyworld.scores import Record

PRESET, TRAIN_PRESET = "configs/wan_tiny_4x.yaml", "configs/train/wan_tiny_4x.yaml"
NEXT_CAPTION = 43  # has no factor in common with their number: each comes once, and values mix early


@dataclass(frozen=True)
class Row:
    """Describes a run: its mask, positions, whether it is longer than the training and has an adapter."""

    title: str
    pattern: str
    longer: bool = True
    tuned: bool = False
    positions: str = "plain"


ROWS = {
    "dense_1x": Row("dense", "dense", longer=False),
    "dense": Row("dense", "dense"),
    "riflex": Row("dense, RIFLEx", "dense", positions="riflex"),
    "dense_lora": Row("dense + LoRA", "dense", tuned=True),
    "radial": Row("radial", "radial"),
    "radial_lora": Row("radial + LoRA", "radial", tuned=True),
    "spatial_lora": Row("spatial + LoRA", "spatial", tuned=True),
    "temporal_lora": Row("temporal + LoRA", "temporal", tuned=True),
    "strided_lora": Row("strided + LoRA", "strided", tuned=True),
    "random_lora": Row("random + LoRA", "random", tuned=True),
}


@dataclass(frozen=True)
class Study:
    """Holds the options: work folder, counts of videos to train on and captions to show, and overrides."""

    work: Path
    videos: int
    captions: int
    batch: int
    training_words: list[str]
    generation_words: list[str]

    @property
    def clips(self) -> Path:
        """Returns the folder of the rendered videos; another number has another folder."""
        return self.work / f"videos_{self.videos}"

    @property
    def latents(self) -> Path:
        return self.work / f"latents_{self.videos}"

    def config(self, name: str) -> Config:
        """Returns the configuration that a run generates with."""
        row = ROWS[name]
        words = [f"attention.pattern={row.pattern}", f"model.positions={row.positions}"]
        if row.tuned:  # a fused adapter costs nothing in a step
            words += [f"model.loras={self.work / name / FILE}", "model.lora_mode=fused"]
        else:
            words += ["model.loras=null"]
        config = read_one_seed(PRESET, [*self.generation_words, *words])
        if not row.longer:
            config.generation.num_frames = config.model.positions_frames
        return config

    def training_config(self, name: str) -> LoraTrainConfig:
        """Returns the configuration that a run is trained with, or its videos are prepared with."""
        sizes, row = self.config("dense").generation, ROWS[name]
        words = [
            f"data.folder={self.clips}",
            f"data.latents={self.latents}",
            f"data.sizes={sizes.num_frames}x{sizes.height}x{sizes.width}",
            f"attention.pattern={row.pattern}",
            f"model.positions={row.positions}",
            f"output.path={self.work / name}",
        ]
        return TRAINING.read(TRAIN_PRESET, [*self.training_words, *words])


@dataclass(frozen=True)
class Result:
    """Holds the results of a run.

    Attributes:
        config: of its generation; density: of its mask.
        entries: a record of `toyworld.scores` for each caption; shown: the video of the first caption.
        held_out_loss: the trainer's loss on videos held out; None without such videos.
        training_seconds: median of the training steps; None without a training.
        step_seconds: median of the denoising steps of one video, in turn with the other runs; with dense
            steps, the mean of both kinds by their number.
    """

    config: Config
    entries: list[Record]
    shown: Path
    density: float
    held_out_loss: float | None
    training_seconds: float | None
    step_seconds: float


def captions_of(count: int) -> list[Attributes]:
    """Returns the first captions, in an order that has all values of an attribute about equally often."""
    everything = all_attributes()
    return [everything[NEXT_CAPTION * (i + 1) % len(everything)] for i in range(count)]


def title(config: Config, name: str) -> str:
    """Returns the title of a run: `4x radial + LoRA`."""
    longer = (config.generation.num_frames - 1) / (config.model.positions_frames - 1)
    return f"{longer:g}x {ROWS[name].title}"
