"""What the ablation measures of each run, all of it kept: videos beside the dense ones, and times."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scripts.evaluation.ablation_runs import Run
from scripts.evaluation.files import write_json
from scripts.evaluation.metrics import psnr, ssim
from scripts.run.config import AttentionConfig, Config
from scripts.run.digest import digest
from scripts.run.files import replacing
from scripts.run.sampler import Job, to_bytes
from scripts.run.system import hardware
from scripts.toyworld.accuracy import mean_step, reading, readings, seconds_in_turn, without_warm_up
from scripts.toyworld.render import Attributes

DENSE = "dense"
Entry = dict[str, Any]


class Setup(NamedTuple):
    """What all runs share.

    Attributes:
        rows: sampled query rows; work: folder of everything that is kept.
        program: digest of sources and weights as they were at the start.
    """

    job: Job
    captions: list[Attributes]
    batch: int
    rows: int
    work: Path
    program: str

    @property
    def dense(self) -> Config:
        """The configuration of the dense videos."""
        return all_dense(self.job.config)

    def folder(self, config: Config) -> Path:
        """Where what this configuration, program, weights and device made is kept; it is made."""
        key = f"{self.program} {self.job.device} {json.dumps(asdict(config))}"
        name = hashlib.sha256(key.encode()).hexdigest()
        folder = self.work / "readings" / name[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def all_dense(config: Config) -> Config:
    """Dense attention everywhere; whatever the mask's options are, it is the same."""
    own = config.attention
    attention = AttentionConfig(pattern=DENSE, dense_steps=0, dense_layers=0, check="off")
    attention = replace(attention, backend=own.backend, dense_backend=own.dense_backend)
    return replace(config, attention=attention)


def program_digest(config: Config, path: str) -> str:
    """Of the sources and the weights that all videos and numbers of an ablation follow from."""
    return digest(all_dense(config), path)


def dense_videos(setup: Setup, pipeline: Any) -> list[Entry]:
    """Generates the dense videos that are missing and keeps them as uint8; what each shows."""
    folder = setup.folder(setup.dense)

    def judge(video: np.ndarray, attributes: Attributes) -> Entry:
        _keep(_file(folder, attributes), to_bytes(video))
        return reading(video, attributes)

    found = readings(pipeline, setup.dense, setup.captions, setup.batch, folder / "dense.json", judge=judge)
    return _in_order(setup, found)


def compared(setup: Setup, pipeline: Any, config: Config) -> list[Entry]:
    """What each video of a run shows, and its `psnr` and `ssim` to the dense one of the same seed.

    A video equal to the dense one has None for the PSNR, which is infinite.
    """
    dense = setup.folder(setup.dense)

    def judge(video: np.ndarray, attributes: Attributes) -> Entry:
        frames, wanted = to_bytes(video), np.load(_file(dense, attributes))["frames"]
        same = np.array_equal(frames, wanted)
        likeness = {"psnr": None if same else psnr(frames, wanted), "ssim": ssim(frames, wanted)}
        return reading(video, attributes) | likeness

    file = setup.folder(config) / "readings.json"
    return _in_order(setup, readings(pipeline, config, setup.captions, setup.batch, file, judge=judge))


def _in_order(setup: Setup, found: list[Entry]) -> list[Entry]:
    places = {entry["caption"]: entry for entry in found}
    return [places[attributes.caption] for attributes in setup.captions]


def _file(folder: Path, attributes: Attributes) -> Path:
    return folder / f"{attributes.caption.replace(' ', '-')}.npz"


def _keep(file: Path, frames: np.ndarray) -> None:
    with replacing(file) as part, part.open("wb") as stream:
        np.savez_compressed(stream, frames=frames)


def paces(setup: Setup, pipeline: Any, runs: Iterable[Run]) -> dict[str, float]:
    """Seconds of a step that is dense, under "dense", and of each run's radial step, under its `pace`.

    All take turns; where one is missing from what is kept, or that is of other hardware or another number of
    threads, all are timed anew and take its place.
    """
    names = {run.pace: without_warm_up(run.config) for run in runs} | {DENSE: setup.dense}
    file, here = setup.folder(setup.dense) / "seconds.json", hardware(setup.job.device)
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("hardware") != here or not names.keys() <= known["seconds"].keys():
        print(f"timing     {len(names)} kinds of step in turn", flush=True)
        timed = {name: (pipeline, config) for name, config in names.items()}
        known = {"hardware": here, "seconds": seconds_in_turn(timed, setup.captions[0])}
        write_json(file, known)
    return known["seconds"]


def step_seconds(run: Run, known: dict[str, float]) -> float:
    """Mean seconds of a step of a whole run, its dense steps counted."""
    return mean_step(run.config, known[DENSE], known[run.pace])
