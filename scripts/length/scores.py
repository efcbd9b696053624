"""What a longer video of the toy world is judged by: its caption, motion all along, identity, size and speed.

A shape of the toy world takes 28 to 44 frames for its path, however long the video is, so that every part of
33 frames, the length that the bundled models were trained with, shows its motion: 129 frames have four parts.
"""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from scripts.toyworld import read
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
SLACK = 0.1  # of size and speed beyond what the toy world draws
Record = dict[str, Any]


def parts(frames: int, trained_frames: int) -> list[slice]:
    """A video as parts of `trained_frames`, evenly spread; neighbours share a frame where lengths are 4k + 1.

    One part where the video is no longer than that.
    """
    count = max(1, round((frames - 1) / max(1, trained_frames - 1)))
    length = min(frames, trained_frames)
    starts = torch.linspace(0, frames - length, count).round().int().tolist()
    return [slice(start, start + length) for start in starts]


def record(video: Tensor, attributes: Attributes, trained_frames: int) -> Record:
    """What is seen in a video `[frames, height, width, 3]` of 0 .. 1, as JSON can hold it.

    Of the whole video which attributes are right, radius and period, of each part all four attributes, and
    colour and shape of the first and the last quarter; None where nothing can be recognised.
    """
    quarter, seen = max(1, len(video) // 4), read(video)
    return {
        "caption": attributes.caption,
        **seen.matches(attributes),
        "frames": len(video),
        "radius": seen.radius,
        "period": seen.period,
        "asked": {name: getattr(attributes, name) for name in VOCABULARY},
        "parts": [_seen(video[part], tuple(VOCABULARY)) for part in parts(len(video), trained_frames)],
        "ends": [_seen(end, IDENTITY) for end in (video[:quarter], video[-quarter:])],
    }


def _seen(video: Tensor, names: Sequence[str]) -> dict[str, str | None]:
    reading = read(video)
    return {name: getattr(reading, name) for name in names}


def judged(entry: Record) -> dict[str, float | None]:
    """Every score of `SCORES` for one video, from 0 to 1; None where it is too short to tell.

    - attributes: share of the four that the whole video shows; whole: all four.
    - motion_throughout: each part by itself shows the motion of the caption.
    - identity_held: colour and shape can be read in the first and the last quarter and are the same;
      identity_right: and are those of the caption.
    - size_right, speed_right: radius and period are among those of the toy world, 10 % more or less.
    """
    right = {name: float(entry[name]) for name in VOCABULARY}
    first, last = entry["ends"]
    held = first == last and None not in first.values()
    asked = entry["asked"]
    return {
        **right,
        "attributes": mean(right.values()),
        "whole": float(all(right.values())),
        "motion_throughout": float(all(part["motion"] == asked["motion"] for part in entry["parts"])),
        "identity_held": float(held),
        "identity_right": float(held and first == {name: asked[name] for name in IDENTITY}),
        "size_right": _within(entry["radius"], RADII),
        "speed_right": _within(entry["period"], PERIODS) if entry["frames"] >= 2 * PERIODS[1] else None,
    }


def _within(value: float | None, limits: tuple[float, float]) -> float:
    least, most = limits
    return float(value is not None and least * (1 - SLACK) <= value <= most * (1 + SLACK))


def shares(entries: Sequence[Record]) -> dict[str, float | None]:
    """The mean of every score, in percent; None where the videos are too short to tell."""
    found = [judged(entry) for entry in entries]
    return {
        name: None if None in (scores := [one[name] for one in found]) else 100 * mean(scores)
        for name in SCORES
    }


def by_part(entries: Sequence[Record]) -> list[float]:
    """Percent of the videos of which a part by itself shows all of the caption, part by part."""
    rows = zip(*([part == entry["asked"] for part in entry["parts"]] for entry in entries), strict=True)
    return [100 * mean(row) for row in rows]


def difference(score: str, entries: Sequence[Record], others: Sequence[Record]) -> tuple[float, float]:
    """Points by which `entries` are ahead of `others` in a score, caption by caption, and its standard error.

    Raises ValueError where their captions differ.
    """
    ours, theirs = ({entry["caption"]: judged(entry)[score] for entry in rows} for rows in (entries, others))
    if ours.keys() != theirs.keys():
        raise ValueError(f"both must have the same captions, got {len(ours)} and {len(theirs)}")
    gaps = [100 * (ours[caption] - theirs[caption]) for caption in ours]
    return mean(gaps), stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
