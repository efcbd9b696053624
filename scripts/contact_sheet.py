"""Puts frames of videos into one picture: `python -m scripts.contact_sheet VIDEO.mp4 ... --out FILE.png`."""

import sys
from pathlib import Path

from scripts.evaluation.frame_sheet import read_frames, sheet
from scripts.run.errors import OneLineParser, UsageError, one_line, positive


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 after an error."""
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
            raise UsageError(f"got sizes {sorted({row.shape[1:3] for row in rows})}; use videos of one size")
        imageio.imwrite(options.out, sheet(rows, options.scale))
    except (OSError, UsageError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(options.out)


if __name__ == "__main__":
    main()
