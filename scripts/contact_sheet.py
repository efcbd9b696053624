"""Puts frames of videos into one picture: `python -m scripts.contact_sheet VIDEO.mp4 ... --out FILE.png`.

With `--out FILE.gif` the videos play side by side, each below a label from its record.
"""

import sys
from pathlib import Path

from scripts.evaluation.frame_sheet import read_frames, sheet, write_gif
from scripts.run.errors import OneLineParser, UsageError, one_line, positive
from scripts.run.files import replacing

KINDS = (".png", ".jpg", ".gif")


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with code 2 after an error."""
    import imageio

    parser = OneLineParser(prog="contact_sheet", description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--frames", type=positive, help="frames of each video (9; in a GIF all)")
    parser.add_argument("--scale", type=positive, default=1, help="enlargement")
    options = parser.parse_args(argv)
    kind = options.out.suffix.lower()
    if kind not in KINDS:
        parser.error(f"--out: got {str(options.out)!r}; allowed endings: {', '.join(KINDS)}")
    is_gif = kind == ".gif"
    try:
        rows = [read_frames(video, options.frames or (None if is_gif else 9)) for video in options.videos]
        if len({row.shape for row in rows}) > 1:
            sizes = sorted({row.shape[:3] for row in rows})
            raise UsageError(f"got videos of several sizes, {sizes}; use videos of one size")
        with replacing(options.out, options.out.suffix) as part:
            if is_gif:
                write_gif(options.videos, rows, options.scale, part)
            else:
                imageio.imwrite(part, sheet(rows, options.scale))
    except (OSError, UsageError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(options.out)


if __name__ == "__main__":
    main()
