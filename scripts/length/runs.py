"""The runs of the length study: what each generates and trains with, and what it came to."""

from dataclasses import dataclass
from pathlib import Path

from radial_attn.models.training.adapter import FILE
from scripts.length.scores import Record
from scripts.lora.config import SCHEMA as TRAINING
from scripts.lora.config import LoraTrainConfig
from scripts.run.config import Config, read_config
from scripts.toyworld import all_attributes
from scripts.toyworld.render import Attributes

PRESET, TRAIN_PRESET = "configs/wan_tiny_4x.yaml", "configs/train/wan_tiny_4x.yaml"
NEXT_CAPTION = 43  # has no factor in common with their number: each comes once, and all values early


@dataclass(frozen=True)
class Row:
    """One run: its mask, whether it is longer than the training was, with an adapter, and its positions."""

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
    """What is asked for: folder, how many videos to train on and captions to show, keys of both programs."""

    work: Path
    videos: int
    captions: int
    batch: int
    training_words: list[str]
    generation_words: list[str]

    @property
    def clips(self) -> Path:
        """Folder of the rendered videos; a longer or other set has a folder of its own."""
        return self.work / f"videos_{self.videos}"

    @property
    def latents(self) -> Path:
        return self.work / f"latents_{self.videos}"

    def adapter(self, name: str) -> Path:
        """The file that the training of a run ends with."""
        return self.work / name / FILE

    def config(self, name: str) -> Config:
        """What a run generates with."""
        row = ROWS[name]
        words = [*self.generation_words, f"attention.pattern={row.pattern}"]
        words += [f"model.positions={row.positions}"]
        words += [f"model.loras={self.adapter(name) if row.tuned else 'null'}"]
        if row.tuned:  # a fused adapter costs nothing in a step
            words += ["model.lora_mode=fused"]
        config = read_config(PRESET, words)
        if not row.longer:
            config.generation.num_frames = config.model.positions_frames
        return config

    def training(self, name: str) -> list[str]:
        """The command line of a run's training."""
        return [
            *self._data_words(),
            f"attention.pattern={ROWS[name].pattern}",
            f"model.positions={ROWS[name].positions}",
            f"output.path={self.work / name}",
        ]

    def training_config(self, name: str) -> LoraTrainConfig:
        """What a run is trained with."""
        file, *words = self.training(name)
        return TRAINING.read(file, words)

    def preparation_config(self) -> LoraTrainConfig:
        """What the videos are prepared with."""
        file, *words = self._data_words()
        return TRAINING.read(file, [*words, f"data.folder={self.clips}"])

    def _data_words(self) -> list[str]:
        sizes = self.config("dense").generation
        size = f"{sizes.num_frames}x{sizes.height}x{sizes.width}"
        return [TRAIN_PRESET, *self.training_words, f"data.latents={self.latents}", f"data.sizes={size}"]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        config: of its generation.
        entries: a record of `scripts.length.scores` for each caption; shown: video of the first.
        density: of its mask.
        held_out_loss: of the trainer on the videos held out, None where no such video was seen.
        training_seconds: median of its training steps, None without a training.
        step_seconds: of a denoising step of one video, medians in turn with the other runs; where there are
            dense steps, the mean of both kinds by their number.
    """

    config: Config
    entries: list[Record]
    shown: Path
    density: float
    held_out_loss: float | None
    training_seconds: float | None
    step_seconds: float


def captions_of(count: int) -> list[Attributes]:
    """The first of all captions, in an order in which the values of an attribute come about equally often."""
    everything = all_attributes()
    return [everything[NEXT_CAPTION * (i + 1) % len(everything)] for i in range(count)]


def title(config: Config, name: str) -> str:
    """A run's name in words: `4x radial + LoRA`."""
    longer = (config.generation.num_frames - 1) / (config.model.positions_frames - 1)
    return f"{longer:g}x {ROWS[name].title}"
