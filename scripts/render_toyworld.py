"""Captioned videos of the toy world, to train on: `python -m scripts.render_toyworld OUT [--videos N] ...`.

The captions take turns. A shape needs 28 to 44 frames for its path, whatever the length of the video: 33
frames show it about once, 129 frames, four times as long, three to four and a half times at the same speed.
So a longer video goes on evenly instead of slowing down. Beside each mp4 lie its caption (.txt) and its scene
(.json). A second call goes on where the first was stopped.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scripts.errors import OneLineParser, one_line, positive
from scripts.files import write_text
from scripts.outputs import write_pair
from toyworld import all_attributes, random_scene, render
from toyworld.render import Scene

FPS = 16
OWN_SEEDS = 10_000_000  # videos of a seed


def draw_scene(seed: int, number: int) -> Scene:
    """The scene of a video: every caption once before any comes again, in an order of the seed."""
    attributes = all_attributes()
    around, place = divmod(number, len(attributes))
    order = torch.randperm(len(attributes), generator=_generator(seed, OWN_SEEDS - 1 - around))
    return random_scene(attributes[order[place]], _generator(seed, number))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * OWN_SEEDS + number)


def render_one(folder: Path, number: int, options: argparse.Namespace) -> bool:
    """Writes caption, video and record of a number; False where they are there already.

    Raises:
        OSError: they cannot be written.
    """
    path, scene = folder / f"{number:05d}.mp4", draw_scene(options.seed, number)
    record = {
        "caption": scene.attributes.caption,
        "frames": options.frames,
        "size": options.size,
        "scene": json.loads(json.dumps(asdict(scene))),
        "seconds": {},
    }
    if _is_there(path, record):
        return False
    write_text(path.with_suffix(".txt"), scene.attributes.caption + "\n")
    video = render(scene, options.frames, options.size, options.size)
    write_pair(path, (video * 255).round().byte().numpy(), FPS, record)
    return True


def _is_there(path: Path, record: dict[str, Any]) -> bool:
    try:
        before = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return False
    same = isinstance(before, dict) and before | {"seconds": {}} == record
    return same and path.is_file() and caption == record["caption"]


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
        options.out.mkdir(parents=True, exist_ok=True)
        with tqdm(range(options.videos), desc="rendering", unit="video", dynamic_ncols=True) as bar:
            made = sum(render_one(options.out, number, options) for number in bar)
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
