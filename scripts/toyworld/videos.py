"""Writes captioned videos of the toy world, to train on."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from scripts.run.files import write_text
from scripts.run.outputs import is_whole, read_record, write_pair
from scripts.toyworld import all_attributes, random_scene, render
from scripts.toyworld.render import Scene

FPS = 16
VIDEOS = 10_000_000  # most videos of a seed


def render_videos(folder: Path, videos: int, *, frames: int, size: int, seed: int = 0) -> int:
    """Renders the videos that are missing and returns how many; OSError if they cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(range(videos), desc="rendering", unit="video", dynamic_ncols=True) as bar:
        return sum(render_one(folder, number, frames=frames, size=size, seed=seed) for number in bar)


def draw_scene(seed: int, number: int) -> Scene:
    """Draws the scene of a video: all captions come once, in an order set by the seed, before any repeats."""
    attributes = all_attributes()
    around, index = divmod(number, len(attributes))
    order = torch.randperm(len(attributes), generator=_generator(seed, VIDEOS - 1 - around))
    return random_scene(attributes[order[index]], _generator(seed, number))


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * VIDEOS + number)


def render_one(folder: Path, number: int, *, frames: int, size: int, seed: int) -> bool:
    """Writes caption, video and record of a number; False if they exist, OSError if it fails."""
    path, scene = folder / f"{number:05d}.mp4", draw_scene(seed, number)
    record = {
        "caption": scene.attributes.caption,
        "frames": frames,
        "size": size,
        "scene": json.loads(json.dumps(asdict(scene))),
        "seconds": {},
    }
    try:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        caption = None
    before = read_record(path.with_suffix(".json"))
    same = {key: before.get(key) for key in record} | {"seconds": {}} == record
    if same and caption == record["caption"] and is_whole(path):
        return False
    write_text(path.with_suffix(".txt"), scene.attributes.caption + "\n")
    video = render(scene, frames, size, size)
    write_pair(path, (video * 255).round().byte().numpy(), FPS, record)
    return True
