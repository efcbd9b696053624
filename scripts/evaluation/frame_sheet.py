"""Reads frames of videos, tiles them into one picture, and puts videos side by side in a GIF."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.run import video_files
from scripts.run.errors import UsageError, one_line

GAP = 4  # white pixels between frames
LABEL, FONT = 20, 12  # pixels: height of the label above a video, size of its letters
COLOURS = 16  # of a GIF: flat shapes on a flat ground need no more
STILL = 8  # levels of 255: in a GIF a pixel that changes by less is held, which halves the file


def read_video(path: Path) -> np.ndarray:
    """Reads all frames of a video file, uint8 `[T, H, W, 3]`; UsageError if that fails."""
    try:
        return np.stack([np.asarray(frame) for frame in video_files.read_video(path)])
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read frames of {path}: {one_line(error)}") from error


def read_frames(path: Path, count: int | None = None) -> np.ndarray:
    """Reads `count` frames, evenly spaced from first to last, or all: uint8 `[count, H, W, 3]`."""
    frames = read_video(path)
    return frames[np.linspace(0, len(frames) - 1, count or len(frames)).round().astype(int)]


def sheet(rows: Sequence[np.ndarray], scale: int) -> np.ndarray:
    """Tiles rows of frames `[count, H, W, 3]` of one size on white, each pixel `scale` times larger."""
    enlarged = [row.repeat(scale, axis=1).repeat(scale, axis=2) for row in rows]
    padding = ((0, 0), (0, GAP), (0, GAP), (0, 0))
    lines = [np.concatenate(list(np.pad(row, padding, constant_values=255)), axis=1) for row in enlarged]
    return np.concatenate(lines)[:-GAP, :-GAP]


def label(record: dict[str, Any]) -> str:
    """Returns which attention made a video and how long its denoising took: `dense, 13.4 s`."""
    pattern = record["config"]["attention"]["pattern"]
    text = f"{pattern}, {record['seconds']['denoise']:.1f} s"
    return text if pattern == "dense" else f"{text}, density {record['density']:.2f}"


def animation(videos: Sequence[np.ndarray], labels: Sequence[str], scale: int) -> list[Image.Image]:
    """Puts videos `[count, H, W, 3]` of one size side by side, each below its label, in one palette."""
    videos = [_steady(video) for video in videos]
    height, width = (scale * size for size in videos[0].shape[1:3])
    head = Image.new("RGB", (len(videos) * (width + GAP) - GAP, LABEL + height), "white")
    draw, font = ImageDraw.Draw(head), ImageFont.load_default(FONT)
    for number, text in enumerate(labels):
        draw.text((number * (width + GAP) + width // 2, LABEL // 2), text, "black", font, anchor="mm")
    frames = []
    for row in zip(*videos, strict=True):
        frames.append(head.copy())
        frames[-1].paste(Image.fromarray(sheet([np.stack(row)], scale)), (0, LABEL))
    sample = [np.asarray(frame) for frame in frames[:: max(1, len(frames) // 8)]]
    palette = Image.fromarray(np.concatenate(sample)).quantize(COLOURS)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _steady(video: np.ndarray) -> np.ndarray:
    """Holds each pixel at its last shown value until it differs by `STILL` levels."""
    frames = [video[0]]
    for frame in video[1:]:
        change = np.abs(frame.astype(int) - frames[-1]).max(axis=-1, keepdims=True)
        frames.append(np.where(change < STILL, frames[-1], frame))
    return np.stack(frames)


def write_gif(videos: Sequence[Path], rows: Sequence[np.ndarray], scale: int, out: Path) -> None:
    """Writes a GIF that repeats, at the rate and with the labels that the records of the videos give."""
    try:
        records = [json.loads(video.with_suffix(".json").read_text(encoding="utf-8")) for video in videos]
        labels, fps = [label(record) for record in records], records[0]["config"]["output"]["fps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"a GIF needs the .json record of each video: {one_line(error)}") from error
    first, *rest = animation(rows, labels, scale)
    first.save(out, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, optimize=True)
