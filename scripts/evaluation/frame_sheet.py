"""Frames of videos tiled into one picture."""

from pathlib import Path

import numpy as np

from scripts.run.errors import UsageError, one_line

GAP = 4  # white pixels between frames


def read_frames(path: Path, count: int) -> np.ndarray:
    """`count` frames, evenly spaced from the first to the last, uint8 `[count, H, W, 3]`."""
    import imageio

    try:
        frames = np.stack(imageio.mimread(path, memtest=False))
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"cannot read frames of {path}: {one_line(error)}") from error
    return frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]


def sheet(rows: list[np.ndarray], scale: int) -> np.ndarray:
    """Tiles rows of frames `[count, H, W, 3]` of one size on white, each pixel `scale` times larger."""
    enlarged = [row.repeat(scale, axis=1).repeat(scale, axis=2) for row in rows]
    padding = ((0, 0), (0, GAP), (0, GAP), (0, 0))
    lines = [np.concatenate(list(np.pad(row, padding, constant_values=255)), axis=1) for row in enlarged]
    return np.concatenate(lines)[:-GAP, :-GAP]
