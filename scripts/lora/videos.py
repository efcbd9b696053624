"""Reads videos for training, and cuts them into clips of the training sizes."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scripts.lora.config import DataConfig
from scripts.run.errors import UsageError, one_line
from scripts.run.files import sha256
from scripts.run.image_files import BROKEN, is_image_name, read_image
from scripts.run.inputs import fit
from scripts.run.video_files import probe_video, read_video

SAME_SHAPE = 0.1  # between logarithms of width / height: 480 x 832 counts as 720 x 1280


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


def probe(path: Path) -> tuple[str, int, float, int, int]:
    """Returns digest, frames, frame rate (0 for an image), height and width; raises as the readers do."""
    if is_image_name(path):
        image = read_image(path)
        return sha256(path), 1, 0.0, image.height, image.width
    about = probe_video(path)
    return sha256(path), about.frames, about.fps, about.height, about.width


def read_frames(path: Path) -> Iterator[Image.Image]:
    """Yields the frames of a video, or the one of an image, as 8-bit RGB."""
    if is_image_name(path):
        yield read_image(path)
    else:
        yield from read_video(path)


def plan_clips(videos: list[Video], data: DataConfig) -> list[Clip]:
    """Plans the clips of all videos that have enough frames for any size, in order."""
    return [clip for video in videos for clip in _clips(video, data)]


def too_short(videos: list[Video], data: DataConfig) -> dict[str, str]:
    """Returns the videos that have too few frames for every size: their frames by name."""
    least = min(frames for frames, _, _ in data.sizes)
    counts = {video.name: len(taken_frames(video, data.fps)) for video in videos}
    at = "" if data.fps is None else f" at data.fps={data.fps:g}"
    return {name: f"{count} frames{at}" for name, count in counts.items() if count < least}


def taken_frames(video: Video, fps: float | None) -> list[int]:
    """Returns the numbers of the frames that are nearest in time to those of a rate."""
    ratio = 1.0 if fps is None else max(1.0, video.fps / fps)
    count = math.floor((video.frames - 0.5) / ratio) + 1
    return [number for i in range(count) if (number := math.floor(i * ratio + 0.5)) < video.frames]


def _clips(video: Video, data: DataConfig) -> list[Clip]:
    """Plans clips of the longest size that fits, each in the middle of an equal part of the video."""
    taken = taken_frames(video, data.fps)
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
    with closing(read_frames(video.path)) as frames:
        for clip in clips:
            picked = np.empty((len(clip.frames), clip.height, clip.width, 3), dtype=np.uint8)
            for index, wanted in enumerate(clip.frames):
                try:
                    while number < wanted:
                        frame, number = next(frames, None), number + 1
                except BROKEN as error:
                    raise UsageError(f"data: {video.name} cannot be read ({one_line(error)})") from error
                if frame is None:
                    raise UsageError(
                        f"data: {video.name} breaks off at frame {number} of {video.frames}; remove it, and "
                        "run the same command to resume"
                    )
                picked[index] = fit(frame, clip.height, clip.width)
            yield clip, torch.from_numpy(picked)
