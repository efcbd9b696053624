"""Finds the videos that a page shows side by side, and packs them into it."""

import base64
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from scripts.evaluation.page.run_files import Run
from scripts.evaluation.tables import METRICS, STAGES
from scripts.run.errors import UsageError, one_line
from scripts.run.outputs import NO_FRAMES, encode
from scripts.run.video_files import probe_video, read_video

MIB = 2**20


@dataclass(frozen=True)
class Video:
    """Holds a file, name and options of its setting, and its numbers by the keys of a setting."""

    name: str
    file: Path
    options: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """Holds the videos of one prompt and seed; the first is the reference of the others if `compared`."""

    prompt: str
    seed: int | None
    videos: list[Video]
    compared: bool


def find_clips(runs: list[Run]) -> list[Clip]:
    """Returns the clips of evaluations, then of plain runs; those that differ only in attention share one.

    Raises UsageError if a video that a JSON names is missing.
    """
    clips = [clip for run in runs if run.kind == "evaluation" for clip in _evaluated(run)]
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "generation":
            alike.setdefault(_likeness(run.content), []).append(run)
    clips += map(_generated, alike.values())
    for video in (video for clip in clips for video in clip.videos):
        if not video.file.is_file():
            raise UsageError(f"{video.file}: no such video, but the JSON of its run names it; run it again")
    return clips


def _clip(prompt: str, seed: int | None, videos: list[Video], reference: str) -> Clip:
    videos = sorted(videos, key=lambda video: video.name != reference)
    return Clip(prompt, seed, videos, len(videos) > 1 and videos[0].name == reference)


def _evaluated(run: Run) -> list[Clip]:
    settings = {setting["name"]: setting for setting in run.content["settings"]}
    clips = []
    for entry in run.content["videos"]:
        videos = []
        for name, path in entry["files"].items():
            setting = settings.get(name, {"words": []})
            values = setting | entry["metrics"].get(name, {})
            videos.append(Video(name, run.file.parent / path, " ".join(setting["words"]), values))
        clips.append(_clip(entry["prompt"], entry.get("seed"), videos, run.content["reference"]))
    return clips


def _likeness(record: dict[str, Any]) -> str:
    """Returns prompt, seed and configuration without attention and output; input files count by content."""
    kept = {
        f"{group}.{key}": value
        for group, values in record["config"].items()
        if group not in ("attention", "output") and isinstance(values, dict)
        for key, value in values.items()
        if f"{group}.{key}" not in NO_FRAMES
    }
    inputs = {name: file.get("sha256") for name, file in (record.get("inputs") or {}).items()}
    return json.dumps([record["prompt"], record["seed"], kept, inputs], sort_keys=True)


def _generated(runs: list[Run]) -> Clip:
    """Makes one clip of plain runs; a single one of the dense pattern is the reference."""
    patterns = [run.content["config"]["attention"]["pattern"] for run in runs]
    videos = []
    for pattern, run in zip(patterns, runs, strict=True):
        name = pattern if patterns.count(pattern) == 1 else f"{pattern} ({run.name})"
        sizes = "{num_frames} frames of {height} x {width}, {steps} steps"
        options = sizes.format(**run.content["config"]["generation"])
        videos.append(Video(name, run.file.with_suffix(".mp4"), options, _numbers(run.content)))
    return _clip(runs[0].content["prompt"], runs[0].content["seed"], videos, "dense")


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Returns density, and the seconds of a step that is not dense and of the video."""
    steps, dense = record.get("step_seconds") or [], record.get("dense_steps") or []
    sparse = [seconds for step, seconds in enumerate(steps) if step not in dense]
    stages = [(record.get("seconds") or {}).get(stage) for stage in STAGES]
    return {
        "density": record.get("density"),
        "seconds_step": median(sparse or steps) if steps else None,
        "seconds_video": None if None in stages else sum(stages),
    }


def packed(clips: list[Clip], limit: int) -> list[dict[str, Any]]:
    """Returns what player.js gets of each clip, the videos as data: addresses.

    Raises UsageError for a file that is no video, unequal sizes in a clip, or more than `limit` MiB in all.
    """
    entries, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for clip in tqdm(clips, desc="videos", disable=not clips, leave=False):
            entries.append(_packed(clip, Path(folder) / "video.mp4"))
            size += sum(len(video["source"]) for video in entries[-1]["videos"])
            if size > limit * MIB:
                raise UsageError(
                    f"--videos: got {len(clips)}, of which {len(entries)} fill {size / MIB:.0f} MiB of the "
                    f"page; take fewer, or --limit above {limit} (MiB)"
                )
    return entries


def _packed(clip: Clip, scratch: Path) -> dict[str, Any]:
    entries, sizes = [], []
    for video in clip.videos:
        file, about = _playable(video.file, scratch)
        sizes.append("{frames} frames of {height} x {width}".format(**about))
        if sizes[-1] != sizes[0]:
            raise UsageError(f"{video.file}: got {sizes[-1]}, the reference has {sizes[0]}; use equal sizes")
        metrics = [(key, video.values.get(key)) for key in METRICS]
        caption = ", ".join(f"{key.upper()} {value:.4g}" for key, value in metrics if value is not None)
        if clip.compared and not entries:
            caption = "reference"
        source = "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
        entries.append({"name": video.name, "caption": caption, "source": source})
    label = clip.prompt if clip.seed is None else f"{clip.prompt}, seed {clip.seed}"
    return {"label": label, **about, "compared": clip.compared, "videos": entries}


def _playable(file: Path, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file, or H.264 for browsers written to `scratch`; and its frames, fps, height and width."""
    try:
        about = probe_video(file)
        if (file.suffix, about.coding) != (".mp4", "h264 yuv420p"):
            odd = ((0, about.height % 2), (0, about.width % 2), (0, 0))  # yuv420p needs even sizes
            frames = [np.pad(np.asarray(frame), odd, mode="edge") for frame in read_video(file)]
            encode(scratch, np.stack(frames), about.fps)
            file = scratch
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as a video ({one_line(error)}); run it again") from error
    return file, {"frames": about.frames, "fps": about.fps, "height": about.height, "width": about.width}
