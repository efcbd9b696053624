"""Videos for a page: H.264 that a browser plays, the amplified difference of two, and data: addresses."""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.evaluation.report_runs import Clip
from scripts.run.errors import UsageError, one_line
from scripts.run.inputs import video_reader
from scripts.run.outputs import encode


@dataclass(frozen=True)
class Video:
    """An mp4 file and what its header says; `plays` where a browser can show it as it is."""

    path: Path
    frames: int
    fps: float
    height: int
    width: int
    plays: bool


class Difference:
    """Frames of the absolute difference of two videos, `factor` times as bright, uint8 `[T, H, W, 3]`."""

    def __init__(self, first: Video, second: Video, factor: int) -> None:
        self.first, self.second, self.factor = first, second, factor

    def __len__(self) -> int:
        return min(self.first.frames, self.second.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        pairs = zip(read_frames(self.first), read_frames(self.second), strict=False)
        for _, (one, other) in zip(range(len(self)), pairs, strict=False):
            apart = np.abs(one.astype(np.int16) - other.astype(np.int16))
            yield even(np.minimum(apart * self.factor, 255).astype(np.uint8))


class Frames:
    """Frames of one video, each of even height and width."""

    def __init__(self, video: Video) -> None:
        self.video = video

    def __len__(self) -> int:
        return self.video.frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return (even(frame) for frame in read_frames(self.video))


def open_video(path: Path) -> Video:
    """Reads what a page must know of a video; UsageError where it is none."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        with video_reader(path) as reader:
            about = reader.get_meta_data()
        frames = count_frames_and_secs(str(path))[0]
    except (OSError, ValueError, IndexError, RuntimeError) as error:
        raise UsageError(f"{path}: is no video that can be read ({one_line(error)})") from error
    width, height = about["size"]
    plays = about.get("codec") == "h264" and str(about.get("pix_fmt")).split("(")[0] == "yuv420p"
    return Video(path, frames, float(about["fps"]), height, width, plays)


def read_frames(video: Video) -> Iterator[np.ndarray]:
    """The frames, one after the other, uint8 `[H, W, 3]`."""
    with video_reader(video.path) as reader:
        yield from reader


def even(frame: np.ndarray) -> np.ndarray:
    """The frame with its last row or column once more where there is an odd number, as yuv420p needs it."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def packed_clip(clip: Clip, amplify: int, work: Path) -> dict[str, Any]:
    """The videos of a clip and their differences to the reference, as the page's JSON holds them.

    Raises:
        UsageError: a file that is no video, or two of unequal size or number of frames.
        OSError: ffmpeg cannot write into `work`.
    """
    videos = {name: open_video(path) for name, path in clip.files.items()}
    first = next(iter(videos.values()))
    for video in videos.values():
        _require_alike(first, video)
    files = {name: address(_playable(video, work)) for name, video in videos.items()}
    apart = {}
    for name, video in videos.items():
        if clip.reference and name != clip.reference:
            frames = Difference(videos[clip.reference], video, amplify)
            apart[name] = address(_encoded(frames, video.fps, work))
    return {
        "prompt": clip.prompt,
        "seed": clip.seed,
        "source": clip.source,
        "reference": clip.reference,
        "frames": first.frames,
        "fps": first.fps,
        "height": first.height,
        "width": first.width,
        "amplify": amplify,
        "videos": files,
        "differences": apart,
        "metrics": clip.metrics,
    }


def _require_alike(first: Video, other: Video) -> None:
    sizes = [(video.frames, video.height, video.width) for video in (first, other)]
    if sizes[0] != sizes[1]:
        texts = ["{} frames of {} x {}".format(*size) for size in sizes]
        raise UsageError(f"{other.path}: got {texts[1]}, allowed beside {first.path.name}: {texts[0]}")


def _playable(video: Video, work: Path) -> Path:
    return video.path if video.plays else _encoded(Frames(video), video.fps, work)


def _encoded(frames: Frames | Difference, fps: float, work: Path) -> Path:
    path = work / "video.mp4"
    encode(path, frames, fps)
    return path


def address(path: Path) -> str:
    """The file as a data: address."""
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
