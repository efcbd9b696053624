"""Makes the videos of an evaluation, dense and of each setting, and measures them at the same time.

A video is saved in the folder of its setting, next to a JSON with its configuration and measurements. A dense
one is saved a second time without loss, for the settings that are compared later.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from radial_attn import RadialConfig
from radial_attn.models.lora.keys import listed
from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.metrics import compare
from scripts.evaluation.recall import Readings
from scripts.evaluation.settings import DENSE
from scripts.run.config import Config
from scripts.run.digest import digest
from scripts.run.errors import GenerationError, UsageError, one_line, reason_of
from scripts.run.families import segments
from scripts.run.files import replacing
from scripts.run.outputs import (
    Contents,
    finished,
    is_whole,
    of_video,
    read_record,
    resolved,
    video_path,
    write_pair,
)
from scripts.run.plan import RunPlan
from scripts.run.sampler import Sampler
from scripts.run.system import hardware, synchronizer

FRAMES = ".mkv"


@dataclass(frozen=True)
class Take:
    """Holds a prompt and a seed; `number` of the prompt in its file, 0 without one, `index` of the seed."""

    prompt: str
    seed: int
    number: int
    index: int


@dataclass
class Evaluation:
    """Holds the folder, a plan for each setting by name, dense first, and what to observe."""

    work: Path
    plans: dict[str, RunPlan]
    takes: list[Take]
    masks: dict[str, RadialConfig]
    rows: int
    steps: list[int]

    def config(self, name: str, take: Take) -> Config:
        """Returns the configuration of one video."""
        return of_video(self.plans[name].config, take.prompt, take.seed)

    def path(self, name: str, take: Take) -> Path:
        config = self.config(name, take)
        config.output = replace(config.output, path="")
        return self.work / "videos" / name / video_path(config, take.prompt, take.number)

    def record(self, name: str, take: Take) -> dict[str, Any]:
        """Reads the JSON of a video; {} if it is missing or damaged."""
        return read_record(self.path(name, take).with_suffix(".json"))

    def is_measured(self, name: str, take: Take) -> bool:
        """Returns whether the JSON of a video has the form of what is measured on it."""
        record, kinds = self.record(name, take), {"seconds": dict, "step_seconds": list, "machine": dict}
        kinds |= {"attention": dict, "asked": dict} if name == DENSE else {"metrics": dict}
        whole = all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        return whole and len(record["step_seconds"]) >= self.plans[name].config.generation.steps

    @cached_property
    def programs(self) -> dict[str, str]:
        """Digests program, weights, LoRAs and device of a setting's videos and of the dense ones, by name."""
        digests: dict[str, str] = {}
        for names in same_pipeline(self.plans):
            plan = self.plans[names[0]]
            total = digest(Config(model=plan.config.model), plan.path, digests.get(DENSE), plan.device)
            digests |= dict.fromkeys(names, total)
        return digests


def make_missing(evaluation: Evaluation) -> None:
    """Makes the missing videos, pipeline by pipeline, the settings of a prompt in turn.

    Videos of another program, other weights or another device are made again, and a note says so.

    Raises UsageError if a video was made with other settings or cannot be written, GenerationError if a
    pipeline fails.
    """
    missing = missing_videos(evaluation)
    if outdated := sum(_is_outdated(evaluation, name, take) for name, take in missing):
        videos = f"{outdated} video{'s are' if outdated > 1 else ' is'}"
        print(f"note: {videos} made again, because program, weights or device have changed", flush=True)
    here = [evaluation.path(name, take) for name, take in missing if not evaluation.is_measured(name, take)]
    if damaged := [path for path in here if path.with_suffix(".json").exists()]:
        print(f"note: {listed(map(str, damaged), 3)} made again, because the record is damaged", flush=True)
    config = evaluation.plans[DENSE].config
    steps = config.generation.steps * len(segments(config.model.family, config.generation))
    total = len(evaluation.plans) * len(evaluation.takes)
    with tqdm(total=total * steps, initial=(total - len(missing)) * steps, unit="step") as bar:
        for names in same_pipeline(evaluation.plans):
            todo = [(name, take) for name, take in missing if name in names]
            pipeline = Sampler(evaluation.plans[names[0]]).load() if todo else None
            for name, take in todo:
                bar.set_description(name)
                _make(evaluation, pipeline, name, take, bar)
            del pipeline


def missing_videos(evaluation: Evaluation) -> list[tuple[str, Take]]:
    """Returns setting and take of the videos to make, take by take, dense first."""
    missing = []
    for take in evaluation.takes:
        names = [x for x in evaluation.plans if x != DENSE and not _is_done(evaluation, x, take)]
        frames = not names or _has_frames(evaluation, take)
        if not (_is_done(evaluation, DENSE, take) and frames and _is_read(evaluation, take)):
            names.insert(0, DENSE)
        missing += [(name, take) for name in names]
    return missing


def same_pipeline(plans: dict[str, RunPlan]) -> list[list[str]]:
    """Groups the names of the settings that one pipeline serves, the group of dense first."""
    groups: dict[str, list[str]] = {}
    for name, plan in plans.items():
        groups.setdefault(repr(plan.config.model), []).append(name)
    return list(groups.values())


def _is_done(evaluation: Evaluation, name: str, take: Take) -> bool:
    if not evaluation.record(name, take):
        return False
    path, inputs = evaluation.path(name, take), evaluation.plans[name].inputs.files
    done, changed = finished(path, evaluation.config(name, take), take.prompt, Contents(inputs))
    if changed:
        keys = ", ".join(changed)
        raise UsageError(f"{path} was made with other settings ({keys}); use these, or another --work")
    whole = is_whole(path) and evaluation.is_measured(name, take)
    return done and whole and not _is_outdated(evaluation, name, take)


def _has_frames(evaluation: Evaluation, take: Take) -> bool:
    """Returns whether the frames of the dense video are there, all of them."""
    try:
        frames = read_video(evaluation.path(DENSE, take).with_suffix(FRAMES))
    except (OSError, ValueError):
        return False
    return len(frames) == evaluation.config(DENSE, take).generation.num_frames


def _is_outdated(evaluation: Evaluation, name: str, take: Take) -> bool:
    """Returns whether a video was made with another program, other weights or on another device."""
    path = evaluation.path(name, take)
    record = evaluation.record(name, take)
    return path.is_file() and bool(record) and record.get("program") != evaluation.programs[name]


def _is_read(evaluation: Evaluation, take: Take) -> bool:
    """Returns whether the dense video's JSON has the attention of all masks, rows and steps."""
    if not evaluation.rows:
        return True
    wanted, before = _asked(evaluation), evaluation.record(DENSE, take).get("asked", {})
    masks = before.get("masks", {})
    same = all(before.get(key) == wanted[key] for key in ("rows", "steps"))
    return same and masks | wanted["masks"] == masks


def _asked(evaluation: Evaluation) -> dict[str, Any]:
    masks = {name: asdict(mask) for name, mask in evaluation.masks.items()}
    return {"rows": evaluation.rows, "steps": evaluation.steps, "masks": masks}


def _make(evaluation: Evaluation, pipeline: Any, name: str, take: Take, bar: tqdm) -> None:
    """Generates a video and writes it with what was measured."""
    path = evaluation.path(name, take)
    plan = replace(evaluation.plans[name], config=evaluation.config(name, take))
    sampler = Sampler(plan)
    readings = None
    if name == DENSE and evaluation.rows:
        looks = evaluation.masks, evaluation.rows, evaluation.steps, plan.model.attention_layers()
        readings = Readings(*looks, synchronizer(plan.device))
    seconds: dict[str, float] = {}
    try:
        with sampler.reporting_memory():
            frames, run = sampler.sample_video(pipeline, take.prompt, seconds, bar=bar, observer=readings)
    except (UsageError, GenerationError) as error:
        raise GenerationError(f"{name}: {one_line(error)}") from error
    record = {"prompt": take.prompt, "seed": take.seed, "config": resolved(plan.config, take.prompt)}
    record |= {"inputs": plan.inputs.files, "seconds": seconds, "step_seconds": run["step_seconds"]}
    record |= {"program": evaluation.programs[name], "machine": machine(plan.device)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == DENSE:
            record |= {"asked": _asked(evaluation), "attention": readings.table() if readings else {}}
            write_frames(path.with_suffix(FRAMES), frames, plan.config.output.fps)
        else:
            reference = read_video(evaluation.path(DENSE, take).with_suffix(FRAMES))
            record["metrics"] = compare(frames, reference)
        write_pair(path, frames, plan.config.output.fps, record, sampler.sound)
    except OSError as error:
        raise UsageError(f"--work: cannot write {path} ({reason_of(error)})") from error


def machine(device: str) -> dict[str, Any]:
    """Returns what seconds depend on: device, processor, cores and threads, GPU."""
    return {name: value for name, value in hardware(device).items() if not name.endswith("memory_bytes")}


def write_frames(path: Path, frames: np.ndarray, fps: int) -> None:
    """Writes uint8 `[T, H, W, 3]` without loss, whole or not at all."""
    import imageio

    options = {"codec": "libx264rgb", "pixelformat": "rgb24", "macro_block_size": 1, "quality": None}
    quiet = {"output_params": ["-qp", "0"], "ffmpeg_log_level": "quiet"}
    with replacing(path, path.suffix) as part:
        imageio.mimwrite(part, frames, format="FFMPEG", fps=fps, **options, **quiet)
