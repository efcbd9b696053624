"""Renders captioned toy world videos to train on: `python -m scripts.render_toyworld OUT [--videos N] ...`.

The captions take turns. A shape needs 28 to 44 frames for its path, whatever the length of the video: 33
frames show it about once, and 129 frames three to four and a half times at the same speed. So a longer video
keeps its speed. Each mp4 has its caption (.txt) and its scene (.json) next to it. The same command resumes.
"""

import argparse
import sys
from pathlib import Path

from scripts.run.errors import OneLineParser, positive, reason_of
from scripts.toyworld.videos import render_videos


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = OneLineParser(prog="render_toyworld", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the videos")
    parser.add_argument("--videos", type=positive, default=180, help="how many (180 is every caption once)")
    parser.add_argument("--frames", type=positive, default=129, help="frames of each video")
    parser.add_argument("--size", type=positive, default=64, help="pixels a side, even")
    parser.add_argument("--seed", type=int, default=0, help="at least 0; another seed gives other videos")
    options = parser.parse_args(argv)
    if options.size % 2 or not 0 <= options.seed < 2**32:
        parser.error(f"size must be even and seed 0 to 2^32 - 1, got {options.size} and {options.seed}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    try:
        made = render_videos(
            options.out, options.videos, frames=options.frames, size=options.size, seed=options.seed
        )
    except OSError as error:
        print(f"error: cannot write into {options.out} ({reason_of(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    print(f"{options.out}: {made} of {options.videos} videos made, the others were there already")
    return 0


if __name__ == "__main__":
    sys.exit(main())
