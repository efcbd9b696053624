"""Reads from saved videos of the toy world whether they show what their captions ask for."""

from collections.abc import Iterable
from statistics import mean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.videos import Evaluation
from scripts.toyworld.render import Attributes, parse_caption
from scripts.toyworld.scores import judged, record

SHOWN = ("attributes", "motion_throughout", "speed_right")


def shown(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """Returns the mean of each score of `SHOWN` by setting; {} if a prompt is no caption of the toy world.

    A score that no video is long enough for is None.
    """
    asked = captions(take.prompt for take in evaluation.takes)
    if not asked:
        return {}
    model = next(iter(evaluation.plans.values())).config.model
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in evaluation.plans}
    todo = [(name, take) for name in evaluation.plans for take in evaluation.takes]
    for name, take in tqdm(todo, desc="reading", unit="video"):
        video = torch.from_numpy(read_video(evaluation.path(name, take)) / np.float32(255))
        trained = model.positions_frames or len(video)
        scores[name].append(judged(record(video, asked[take.prompt], trained)))
    return {
        name: {key: _mean(entry[key] for entry in entries) for key in SHOWN}
        for name, entries in scores.items()
    }


def captions(prompts: Iterable[str]) -> dict[str, Attributes]:
    """Returns the attributes of each prompt; {} if one of them is no caption of the toy world."""
    try:
        asked = {prompt: parse_caption(prompt) for prompt in prompts}
    except ValueError:
        return {}
    return asked if all(prompt == x.caption for prompt, x in asked.items()) else {}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
