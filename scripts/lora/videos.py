"""Finds and checks videos with captions for training, and cuts them into clips of the training sizes."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from radial_attn.models.lora.keys import listed
from scripts.lora.config import DataConfig
from scripts.run.errors import UsageError, one_line
from scripts.run.files import sha256
from scripts.run.inputs import fit
from scripts.run.schema import find_path
from scripts.run.video_files import SUFFIXES, is_video_name, probe_video, read_video

SAME_RATE = 0.01  # share by which a rate may be missed: 24 includes films at 23.976
SAME_SHAPE = 0.1  # between logarithms of width / height: 480 x 832 counts as 720 x 1280


@dataclass(frozen=True)
class Entry:
    """Holds a video's name and file, and its caption or the caption's file."""

    name: str
    path: Path
    caption: str | Path


@dataclass(frozen=True)
class Video:
    """Holds a video that can be read; `digest`: sha256 of its file."""

    name: str
    path: Path
    caption: str
    digest: str
    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """Holds frames of a video, by number, and the size that they are fitted to."""

    name: str
    video: Video
    frames: tuple[int, ...]
    height: int
    width: int

    @property
    def shape(self) -> str:
        """Returns the size as `129x64x64`."""
        return f"{len(self.frames)}x{self.height}x{self.width}"

    @property
    def key(self) -> str:
        """Returns a key that depends on the file's content, the frames and the size, not on names."""
        taken = [self.video.digest, self.frames, self.height, self.width]
        return hashlib.sha256(json.dumps(taken).encode()).hexdigest()[:24]

    def entry(self) -> dict[str, Any]:
        """Returns the clip's entry in the index of latents."""
        sizes = {"frames": len(self.frames), "height": self.height, "width": self.width}
        return {"name": self.name, "caption": self.video.caption, **sizes, "key": self.key}


def read_videos(data: DataConfig) -> list[Video]:
    """Reads all videos of `data.folder` or `data.table`, each to its end once.

    Raises:
        UsageError: there are no videos, a video is missing or unreadable, a caption is missing, empty or not
            UTF-8, a table cannot be read, frame rates differ without `data.fps`, or are lower than that.
    """
    key, entries = _find(data)
    captions = [_caption(entry) for entry in entries]
    _refuse(key, entries, captions, "have no caption that can be read")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        probed = pool.map(_probe, entries)
        probes = list(tqdm(probed, total=len(entries), desc="checking", unit="video", disable=None))
    _refuse(key, entries, probes, "cannot be read")
    videos = [Video(e.name, e.path, c, *about) for e, c, about in zip(entries, captions, probes, strict=True)]
    _check_rates(videos, data.fps)
    return videos


def _find(data: DataConfig) -> tuple[str, list[Entry]]:
    if (data.folder is None) == (data.table is None):
        got = f"data.folder: got {data.folder!r}, and data.table: got {data.table!r}"
        raise UsageError(f"{got}; set one of them, and the other to null")
    if data.table is not None:
        return "data.table", _in_table(data.table)
    folder = find_path(data.folder)
    files = [file for file in sorted(folder.rglob("*")) if is_video_name(file) and file.is_file()]
    if not files:
        kind = "has no videos" if folder.is_dir() else "is no folder"
        raise UsageError(
            f"data.folder: got {data.folder!r}, which {kind}; name a folder of videos ({', '.join(SUFFIXES)})"
        )
    entries = [Entry(file.relative_to(folder).as_posix(), file, file.with_suffix(".txt")) for file in files]
    return "data.folder", entries


def _in_table(name: str) -> list[Entry]:
    path = find_path(name)
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise UsageError(f"data.table: got {name!r}, must be a file ending in .jsonl or .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if kind == ".csv":
                reader = csv.DictReader(stream)
                rows = [(reader.line_num, row) for row in reader]
            else:
                rows = [(i, json.loads(line)) for i, line in enumerate(stream, 1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"data.table: got {name!r}, which cannot be read ({reason})") from error
    entries = []
    for number, row in rows:
        video, caption = (row.get("video"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(video, str) or not video.strip() or not isinstance(caption, str):
            raise UsageError(
                f"data.table: got {name!r}, whose line {number} lacks a text; give `video` and `caption`"
            )
        entries.append(Entry(video, path.parent / Path(video).expanduser(), caption))
    if not entries:
        raise UsageError(f"data.table: got {name!r}, which is empty; write a line for each video")
    return entries


def _caption(entry: Entry) -> str | ValueError:
    """Returns the caption, or why it cannot be used."""
    caption = entry.caption
    try:
        text = caption if isinstance(caption, str) else caption.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return ValueError(f"{caption.name} is not UTF-8")
    except OSError as error:
        return ValueError(f"{caption.name}: {error.strerror}")
    return text.strip() or ValueError("it is empty")


def _probe(entry: Entry) -> tuple[str, int, float, int, int] | ValueError:
    """Returns digest, frames, frame rate, height and width, or an error; decodes the whole video."""
    try:
        info = probe_video(entry.path)
        return sha256(entry.path), info.frames, info.fps, info.height, info.width
    except (OSError, ValueError) as error:
        return ValueError(getattr(error, "strerror", None) or one_line(error))


def _refuse(key: str, entries: list[Entry], results: list, failing: str) -> None:
    """Raises UsageError if a result is a ValueError; names the entries."""
    pairs = zip(entries, results, strict=True)
    bad = [f"{entry.name} ({error})" for entry, error in pairs if isinstance(error, ValueError)]
    if bad:
        raise UsageError(f"{key}: {len(bad)} of {len(entries)} videos {failing}: {listed(bad, 3)}")


def _check_rates(videos: list[Video], fps: float | None) -> None:
    rates: dict[float, list[str]] = {}
    for video in videos:
        if video.frames > 1:
            rates.setdefault(round(video.fps, 2), []).append(video.name)
    if fps is None and len(rates) > 1:
        texts = [f"{rate:g} ({len(names)}, as {names[0]})" for rate, names in sorted(rates.items())]
        raise UsageError(
            f"data.fps: got null, but the videos' rates are {', '.join(texts)} frames a second; set data.fps "
            f"to a number up to {min(rates):g}, or use videos of one rate"
        )
    slow = [video.name for video in videos if fps and 0 < video.fps < fps * (1 - SAME_RATE)]
    if slow:
        raise UsageError(
            f"data.fps: got {fps:g}, but {len(slow)} of {len(videos)} videos have fewer frames a second: "
            f"{listed(slow, 3)}; set it to at most {min(rates):g}"
        )


def plan_clips(videos: list[Video], data: DataConfig) -> list[Clip]:
    """Plans the clips of all videos that have enough frames for any size, in order."""
    return [clip for video in videos for clip in _clips(video, data)]


def too_short(videos: list[Video], data: DataConfig) -> list[str]:
    """Lists the names of the videos that have too few frames for every size."""
    least = min(frames for frames, _, _ in data.sizes)
    return [video.name for video in videos if len(_taken(video, data.fps)) < least]


def _taken(video: Video, fps: float | None) -> list[int]:
    """Returns the numbers of the frames that are nearest in time to those of a rate."""
    ratio = 1.0 if fps is None else max(1.0, video.fps / fps)
    count = math.floor((video.frames - 0.5) / ratio) + 1
    return [number for i in range(count) if (number := math.floor(i * ratio + 0.5)) < video.frames]


def _clips(video: Video, data: DataConfig) -> list[Clip]:
    """Plans clips of the longest size that fits, each in the middle of an equal part of the video."""
    taken = _taken(video, data.fps)
    length = max((frames for frames, _, _ in data.sizes if frames <= len(taken)), default=None)
    if length is None:
        return []
    height, width = _nearest(video, [size[1:] for size in data.sizes if size[0] == length])
    count = min(data.clips, len(taken) // length)
    clips = []
    for part in range(count):
        start = ((2 * part + 1) * len(taken) - count * length) // (2 * count)
        name = f"{video.name}@{taken[start]}" if count > 1 else video.name
        clips.append(Clip(name, video, tuple(taken[start : start + length]), height, width))
    return clips


def _nearest(video: Video, sizes: list[list[int]]) -> list[int]:
    """Chooses from sizes of about the nearest shape the largest without enlarging, else the smallest."""
    shapes = [abs(math.log(video.height * width / (video.width * height))) for height, width in sizes]
    near = [size for size, shape in zip(sizes, shapes, strict=True) if shape <= min(shapes) + SAME_SHAPE]
    near.sort(key=math.prod)
    enough = [size for size in near if not is_enlarged(video, *size)]
    return enough[-1] if enough else near[0]


def is_enlarged(video: Video, height: int, width: int) -> bool:
    """Returns whether covering height x width takes more pixels than the video has."""
    return video.height < height or video.width < width


def read_clips(video: Video, clips: list[Clip]) -> Iterator[tuple[Clip, Tensor]]:
    """Yields each clip of a video with its frames, uint8 `[F, height, width, 3]`; decodes the video once.

    Raises:
        UsageError: the video cannot be read, or breaks off before a clip ends.
    """
    number = -1
    with closing(read_video(video.path)) as frames:
        for clip in clips:
            picked = np.empty((len(clip.frames), clip.height, clip.width, 3), dtype=np.uint8)
            for index, wanted in enumerate(clip.frames):
                try:
                    while number < wanted:
                        frame, number = next(frames, None), number + 1
                except (OSError, ValueError) as error:
                    raise UsageError(f"data: {video.name} cannot be read ({one_line(error)})") from error
                if frame is None:
                    raise UsageError(
                        f"data: {video.name} breaks off at frame {number} of {video.frames}; remove it, and "
                        "run the same command to resume"
                    )
                picked[index] = fit(frame, clip.height, clip.width)
            yield clip, torch.from_numpy(picked)
