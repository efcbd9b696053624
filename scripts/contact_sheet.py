"""Frames of videos as one picture: `python -m scripts.contact_sheet VIDEO.mp4 ... --out FILE.png`."""

import sys
from pathlib import Path

import numpy as np

from scripts.errors import OneLineParser, UsageError, one_line, positive

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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    import imageio

    parser = OneLineParser(prog="contact_sheet", description=__doc__)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=positive, default=9, help="frames of each video")
    parser.add_argument("--scale", type=positive, default=1, help="enlargement")
    options = parser.parse_args(argv)
    try:
        rows = [read_frames(video, options.frames) for video in options.videos]
        if len({row.shape for row in rows}) > 1:
            raise UsageError(f"videos must have one size, got {sorted({row.shape[1:3] for row in rows})}")
        imageio.imwrite(options.out, sheet(rows, options.scale))
    except (OSError, UsageError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(options.out)


if __name__ == "__main__":
    main()
