"""Plans the runs of the lists in configs/ablation, and measures them."""

import math
import zlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml

from radial_attn.masks.density_curve import density_curve
from radial_attn.models import apply_radial_attention
from scripts.evaluation.metrics import psnr, ssim
from scripts.evaluation.recall import KINDS, Readings
from scripts.run.attention import attention_arguments
from scripts.run.config import ROOT, AttentionConfig, Config
from scripts.run.digest import digest
from scripts.run.errors import UsageError
from scripts.run.files import replacing
from scripts.run.plan import RunPlan, make_plan
from scripts.run.results import note_damage, read_json, write_json
from scripts.run.sampler import Sampler, sample, to_bytes
from scripts.run.system import hardware, synchronizer
from scripts.toyworld import all_attributes
from scripts.toyworld.accuracy import first_frame, reading, readings, seconds_in_turn, without_warm_up
from scripts.toyworld.render import Attributes

SCHEDULE = ("dense_steps", "dense_last_steps", "dense_layers")
TABLES = (*SCHEDULE, "decay_factor", "density", "block_size", "sink", "neighbour", "pattern")
DENSE = "dense"
STRIDE = 77  # has no factor in common with the number of captions: each comes once, and all values early
Entry = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Holds one value of a table, and the plan of its videos."""

    value: Any
    plan: RunPlan

    @cached_property
    def mask_name(self) -> str:
        """Returns the same for runs whose masks keep the same."""
        mask = self.plan.block_mask
        return f"{mask.block_size}_{sha256(mask.blocks.numpy().tobytes()).hexdigest()[:12]}"

    @property
    def pace(self) -> str:
        """Returns the same for runs whose radial steps take the same time."""
        return f"{self.mask_name}_{self.plan.dense_layers}"

    @property
    def identity(self) -> Hashable:
        """Returns the same for runs that give the same videos."""
        return self.pace, self.plan.dense_steps


def read_table(name: str) -> dict[str, Any]:
    """Returns the `title`, the `key` and the list of values of a table in configs/ablation."""
    return yaml.safe_load((ROOT / "configs" / "ablation" / f"{name}.yaml").read_text(encoding="utf-8"))


def values_of(table: dict[str, Any], base: RunPlan) -> list[Any]:
    """Returns the values of a table for a plan.

    `factors` multiply the plan's value. `shares` go from the least density that the grid has to the most.
    Of `values` that count steps, layers or tokens, those above what the plan has are left out, and the plan's
    is added.
    """
    name = table["key"].removeprefix("attention.")
    default = getattr(base.config.attention, name)
    if "factors" in table:
        return [default * factor for factor in table["factors"]]
    if "shares" in table:
        (low, *_), *_, (high, *_) = density_curve(base.grid, base.mask)
        return [math.ceil(1000 * (low + share * (high - low))) / 1000 for share in table["shares"]]
    steps = base.config.generation.steps - 1
    most = {"dense_steps": steps, "dense_last_steps": steps, "dense_layers": base.model.layers - 1}
    most |= {"block_size": base.grid.tokens_per_frame}
    if name not in most:
        return table["values"]
    return sorted({default, *(value for value in table["values"] if value <= most[name])})


def runs_of(table: dict[str, Any], base: RunPlan) -> tuple[list[Run], list[str]]:
    """Returns the runs of a table, and why values were left out, such as a density that the grid lacks."""
    runs, left_out = [], []
    for value in values_of(table, base):
        varied = {table["key"].removeprefix("attention."): value}
        config = replace(base.config, attention=replace(base.config.attention, **varied))
        try:
            runs.append(Run(value, make_plan(config)))
        except UsageError as error:
            left_out.append(str(error))
    return runs, left_out


def captions_of(count: int) -> list[Attributes]:
    """Returns the first captions of an order in which the values of an attribute come about equally often.

    Their positions give the videos their seeds.
    """
    everything = all_attributes()
    return [everything[STRIDE * (i + 1) % len(everything)] for i in range(count)]


@dataclass
class Ablation:
    """Measures runs; measurements are kept in a folder and not made twice.

    Attributes:
        batch: videos that are generated at once.
        rows: query rows whose attention is observed.
        work: the folder.
    """

    plan: RunPlan
    captions: list[Attributes]
    batch: int
    rows: int
    work: Path

    @cached_property
    def pipeline(self) -> Any:
        return Sampler(self.plan).load()

    @property
    def dense(self) -> Config:
        """Returns the configuration of the dense videos, the same for all options of the mask."""
        given = self.plan.config.attention
        kept = {name: getattr(given, name) for name in ("backend", "dense_backend", "tune")}
        attention = AttentionConfig(pattern=DENSE, dense_steps=0, dense_layers=0, check="off", **kept)
        return replace(self.plan.config, attention=attention)

    def folder(self, config: Config) -> Path:
        """Makes the folder of the measurements of this configuration, the weights and the device."""
        name = digest(config, self.plan.path, self.plan.device)[:12]
        folder = self.work / "readings" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def videos(self, config: Config, name: str = "readings") -> list[Entry]:
        """Returns what each video shows, and its `psnr` and `ssim` to the dense one of the same seed.

        The dense ones come first and keep their frames. The PSNR of equal videos, which is infinite, is None.
        `name`: of the file that keeps them, for runs of one configuration that differ in something else.
        """
        kept = self.folder(self.dense)

        def frames_file(caption: str) -> Path:
            return kept / f"{caption.replace(' ', '-')}.npz"

        def judge(video: np.ndarray, attributes: Attributes) -> Entry:
            frames, file = to_bytes(video), frames_file(attributes.caption)
            if config == self.dense:
                with replacing(file) as part, part.open("wb") as stream:
                    np.savez_compressed(stream, frames=frames)
            dense = _frames(file)
            if dense is None:
                raise UsageError(f"{file} is damaged; run the same command again, which makes it again")
            near = None if np.array_equal(frames, dense) else psnr(frames, dense)
            return reading(video, attributes) | {"psnr": near, "ssim": ssim(frames, dense)}

        def has_frames(entry: Entry) -> bool:
            return _frames(frames_file(entry["caption"])) is not None

        file, arguments = self.folder(config) / f"{name}.json", {"judge": judge}
        if config == self.dense:
            arguments["is_kept"] = has_frames
        entries = readings(self.pipeline, config, self.captions, self.batch, file, **arguments)
        by_caption = {entry["caption"]: entry for entry in entries}
        return [by_caption[attributes.caption] for attributes in self.captions]

    def attention(self, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
        """Returns the table of `Readings` by mask name, of all steps of the first caption's dense video."""
        file, first = self.folder(self.dense) / f"attention_{self.rows}.json", self.captions[0]
        known = read_json(file)
        missing = {run.mask_name: run.plan.mask for run in runs if run.mask_name not in known}
        if missing:
            print(f"attention  {len(missing)} masks along the dense run", flush=True)
            generation, plan = self.plan.config.generation, self.plan
            steps, layers = range(1, generation.steps + 1), plan.model.attention_layers()
            seen = Readings(missing, self.rows, steps, layers, synchronizer(plan.device))
            options = attention_arguments(self.dense.attention) | {"observe": seen.see}
            arguments = first_frame(self.dense, first, generation.seed) | {"output_type": "latent"}
            with apply_radial_attention(self.pipeline, **options):
                sample(self.pipeline, self.dense, [first.caption], [generation.seed], **arguments)
            known |= seen.table(KINDS)
            write_json(file, known)
        return known

    def seconds(self, runs: Iterable[Run]) -> dict[str, float]:
        """Returns seconds of a dense step, as "dense", and of a radial step of each run, by its `pace`.

        All take turns. All are timed again if one is missing, or if hardware or number of threads changed.
        """
        configs = {run.pace: without_warm_up(run.plan.config) for run in runs} | {DENSE: self.dense}
        file, here = self.folder(self.dense) / "seconds.json", hardware(self.plan.device)
        known = read_json(file)
        if known.get("hardware") != here or not configs.keys() <= known.get("seconds", {}).keys():
            print(f"timing     {len(configs)} kinds of step in turn", flush=True)
            timed = {name: (self.pipeline, config) for name, config in configs.items()}
            known = {"hardware": here, "seconds": seconds_in_turn(timed, self.captions[0])}
            write_json(file, known)
        return known["seconds"]


def _frames(file: Path) -> np.ndarray | None:
    """Returns the frames of a dense video, None if the file is missing or damaged."""
    try:
        return np.load(file)["frames"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):  # numpy and zlib share no class
        note_damage(file)
        return None


def attention_of(run: Run, table: dict[str, Any]) -> dict[str, float]:
    """Returns means over steps and layers: those that are dense keep everything and have no error.

    `recall`, `mse`, and `relative`, the mean error over the mean square of the dense output.
    """
    recall, mse, square = (np.mean(table[kind], axis=-1) for kind in KINDS)  # [step, layer]
    dense = np.zeros(recall.shape, bool)
    dense[list(run.plan.dense_steps)] = dense[:, : run.plan.dense_layers] = True
    error = np.where(dense, 0, mse).mean()
    kept = {"recall": np.where(dense, 1, recall).mean(), "mse": error, "relative": error / square.mean()}
    return {name: float(value) for name, value in kept.items()}
