"""Captioned videos of the toy world, to train on: `python -m scripts.render_toyworld OUT [--videos N] ...`.

The captions take turns. A shape needs 28 to 44 frames for its path, whatever the length of the video: 33
frames show it about once, 129 frames, four times as long, three to four and a half times at the same speed.
So a longer video goes on evenly instead of slowing down. Beside each mp4 lie its caption (.txt) and its scene
(.json). A second call goes on where the first was stopped.
"""

import argparse
import sys
from pathlib import Path

from scripts.run.errors import OneLineParser, one_line, positive
from scripts.toyworld.files import render_videos


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog="render_toyworld", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder")
    parser.add_argument("--videos", type=positive, default=180, help="how many (180 is every caption once)")
    parser.add_argument("--frames", type=positive, default=129, help="of each")
    parser.add_argument("--size", type=positive, default=64, help="pixels a side, even")
    parser.add_argument("--seed", type=int, default=0, help="from 0; another gives other videos")
    options = parser.parse_args(argv)
    if options.size % 2 or not 0 <= options.seed < 2**32:
        parser.error(f"size must be even and seed from 0 on, got {options.size} and {options.seed}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    try:
        made = render_videos(
            options.out, options.videos, frames=options.frames, size=options.size, seed=options.seed
        )
    except OSError as error:
        reason = error.strerror or one_line(error)
        print(f"error: cannot write into {options.out} ({reason})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"{options.out}: {made} of {options.videos} videos made, the others were there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
