"""Reads from saved videos of the toy world whether they show what their captions ask for."""

import json
from collections.abc import Iterable
from contextlib import suppress
from statistics import mean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scripts.evaluation.frame_sheet import read_video
from scripts.evaluation.videos import Evaluation
from scripts.run.digest import RESULTS_VERSION
from scripts.run.files import sha256
from scripts.run.results import read_json, write_json
from scripts.run.video_files import READER
from scripts.toyworld.render import Attributes, parse_caption
from scripts.toyworld.scores import judged, record

SHOWN = ("attributes", "motion_throughout", "speed_right")
READINGS = "shown.json"


def shown(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """Returns the mean of each score of `SHOWN` by setting; {} if a prompt is no caption of the toy world.

    A score that no video is long enough for is None. The scores of each video are kept in the folder of the
    evaluation.
    """
    asked = captions(take.prompt for take in evaluation.takes)
    if not asked:
        return {}
    model = next(iter(evaluation.plans.values())).config.model
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in evaluation.plans}
    todo = [(name, take) for name in evaluation.plans for take in evaluation.takes]
    file = evaluation.work / READINGS
    kept = read_json(file)
    for name, take in tqdm(todo, desc="reading", unit="video"):
        path, trained = evaluation.path(name, take), model.positions_frames
        key = json.dumps([sha256(path), take.prompt, trained, READER, RESULTS_VERSION])
        if key not in kept:
            video = torch.from_numpy(read_video(path) / np.float32(255))
            values = judged(record(video, asked[take.prompt], trained or len(video)))
            kept[key] = {name: values[name] for name in SHOWN}
            write_json(file, kept)
        scores[name].append(kept[key])
    return {
        name: {key: _mean(entry[key] for entry in entries) for key in SHOWN}
        for name, entries in scores.items()
    }


def captions(prompts: Iterable[str]) -> dict[str, Attributes]:
    """Returns the attributes of each prompt; {} if one of them is no caption of the toy world.

    A note says so if others are, or if it names all attributes in other words.
    """
    asked, others = {}, []
    for prompt in dict.fromkeys(prompts):
        with suppress(ValueError):
            asked[prompt] = parse_caption(prompt)
        if prompt not in asked or asked[prompt].caption != prompt:
            others.append(prompt)
    if not others:
        return asked
    if asked:
        print(
            f"note: the toy world's reader is left out, because {others[0]!r} is no caption of it; captions "
            f"are as {next(iter(asked.values())).caption!r}",
            flush=True,
        )
    return {}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
