"""Scores longer videos of the toy world: caption, motion in every part, identity, size and speed.

A shape of the toy world takes 28 to 44 frames for its path, however long the video is. So every part of 33
frames, the length that the bundled models were trained with, shows its motion; 129 frames have four parts.
"""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from scripts.toyworld import read
from scripts.toyworld.reader import POINTS
from scripts.toyworld.render import PERIODS, RADII, VOCABULARY, Attributes

IDENTITY = ("colour", "shape")
SCORES = {
    **{name: name for name in VOCABULARY},
    "attributes": "all attributes",
    "whole": "whole captions",
    "motion_throughout": "motion throughout",
    "identity_held": "identity held",
    "identity_right": "held and right",
    "size_right": "size right",
    "speed_right": "speed right",
}
SLACK = 0.1  # share by which size and speed may exceed what the toy world draws
Record = dict[str, Any]


def parts(frames: int, trained_frames: int) -> list[slice]:
    """Divides a video into parts of `trained_frames`, evenly spread, or one part if it is not longer.

    Neighbours share a frame if both lengths are 4k + 1.
    """
    count = max(1, round((frames - 1) / max(1, trained_frames - 1)))
    length = min(frames, trained_frames)
    starts = torch.linspace(0, frames - length, count).round().int().tolist()
    return [slice(start, start + length) for start in starts]


def record(video: Tensor, attributes: Attributes, trained_frames: int) -> Record:
    """Reads a video `[frames, height, width, 3]` of 0 .. 1 into values that JSON can hold.

    They are, for the whole video, which attributes are right, radius and period; all four attributes of each
    part; and colour and shape of the first and last quarter. What cannot be recognised is None.
    """
    quarter, whole = max(1, len(video) // 4), read(video)
    cut = [read(video[part]) for part in parts(len(video), trained_frames)]
    ends = [read(video[:quarter]), read(video[-quarter:])]
    return {
        "caption": attributes.caption,
        **whole.matches(attributes),
        "frames": len(video),
        "radius": whole.radius,
        "period": whole.period,
        "asked": {name: getattr(attributes, name) for name in VOCABULARY},
        "parts": [{name: getattr(part, name) for name in VOCABULARY} for part in cut],
        "ends": [{name: getattr(end, name) for name in IDENTITY} for end in ends],
    }


def judged(entry: Record) -> dict[str, float | None]:
    """Returns every score of `SCORES` for one video, from 0 to 1; None if it is too short to tell.

    - attributes: share that the whole video shows, of those that can be told; whole: whether it shows all.
    - motion_throughout: each part by itself shows the motion of the caption.
    - identity_held: colour and shape can be read in the first and last quarter, and are the same.
    - identity_right: they are also those of the caption.
    - size_right, speed_right: radius and period are those of the toy world, within 10 %.
    """
    moves = entry["frames"] >= POINTS
    right = {name: float(entry[name]) if moves or name != "motion" else None for name in VOCABULARY}
    throughout = all(part["motion"] == entry["asked"]["motion"] for part in entry["parts"])
    first, last = entry["ends"]
    held = first == last and None not in first.values()
    asked = entry["asked"]
    return {
        **right,
        "attributes": mean(value for value in right.values() if value is not None),
        "whole": float(all(right.values())) if moves else None,
        "motion_throughout": float(throughout) if moves else None,
        "identity_held": float(held),
        "identity_right": float(held and first == {name: asked[name] for name in IDENTITY}),
        "size_right": _within(entry["radius"], RADII),
        "speed_right": _within(entry["period"], PERIODS) if entry["frames"] >= 2 * PERIODS[1] else None,
    }


def _within(value: float | None, limits: tuple[float, float]) -> float:
    least, most = limits
    return float(value is not None and least * (1 - SLACK) <= value <= most * (1 + SLACK))


def shares(entries: Sequence[Record]) -> dict[str, float | None]:
    """Returns the mean of every score, in percent; None if the videos are too short to tell."""
    rows = [judged(entry) for entry in entries]
    columns = {name: [row[name] for row in rows] for name in SCORES}
    return {name: None if None in column else 100 * mean(column) for name, column in columns.items()}


def by_part(entries: Sequence[Record]) -> list[float]:
    """Returns for each part the percentage of videos in which it shows all of the caption by itself."""
    rows = zip(*([part == entry["asked"] for part in entry["parts"]] for entry in entries), strict=True)
    return [100 * mean(row) for row in rows]


def difference(score: str, entries: Sequence[Record], others: Sequence[Record]) -> tuple[float, float]:
    """Returns by how many points `entries` lead `others` in a score, and the standard error of that.

    Compares caption by caption. Raises ValueError if the captions differ.
    """
    ours, theirs = ({entry["caption"]: judged(entry)[score] for entry in rows} for rows in (entries, others))
    if ours.keys() != theirs.keys():
        raise ValueError(f"both must have the same captions, got {len(ours)} and {len(theirs)}")
    gaps = [100 * (ours[caption] - theirs[caption]) for caption in ours]
    return mean(gaps), stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
