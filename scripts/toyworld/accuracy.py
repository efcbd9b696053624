"""Measures whether videos show what their captions ask for, and how long their steps take."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from radial_attn.models import RadialAttentionHandle, apply_radial_attention
from radial_attn.models.pipeline.families import FAMILIES
from scripts.run.attention import attention_arguments, dense_steps
from scripts.run.config import Config
from scripts.run.files import write_text
from scripts.run.results import read_json
from scripts.run.sampler import sample
from scripts.run.system import synchronizer
from scripts.toyworld import random_scene, read, render
from scripts.toyworld.render import Attributes

TIMED_RUNS, TIMED_STEPS = 3, 4


def attention(pipeline: Any, config: Config) -> RadialAttentionHandle:
    """Applies the attention of `config` until the handle, a context manager, is closed."""
    return apply_radial_attention(pipeline, **attention_arguments(config.attention))


def with_pattern(config: Config, pattern: str) -> Config:
    """Returns the same run with another attention pattern."""
    return replace(config, attention=replace(config.attention, pattern=pattern))


def reading(video: np.ndarray, attributes: Attributes) -> dict[str, Any]:
    """Returns a record: the caption, and which attributes are right."""
    return {"caption": attributes.caption, **read(torch.from_numpy(video)).matches(attributes)}


def readings(
    pipeline: Any,
    config: Config,
    captions: list[Attributes],
    batch: int,
    file: Path,
    *,
    judge: Callable[[np.ndarray, Attributes], dict[str, Any]] = reading,
    is_kept: Callable[[dict], bool] = lambda entry: True,
) -> list[dict]:
    """Returns a record for the video of each caption; makes those that `file` does not hold yet.

    Args:
        judge: makes a record from frames `[T, H, W, 3]` of 0 .. 1 and the caption's attributes.
        is_kept: says whether a record that `file` holds is taken, else it is made again.
    """
    done = [entry for entry in read_json(file, list) if is_kept(entry)]
    seen = {entry["caption"] for entry in done}
    missing = [(i, a) for i, a in enumerate(captions) if a.caption not in seen]
    name = f"{config.attention.pattern} {config.generation.num_frames} frames"
    batch = 1 if "image" in FAMILIES[config.model.family].takes else batch
    with attention(pipeline, config), tqdm(total=len(captions), initial=len(done), desc=name) as bar:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            seeds = [config.generation.seed + i for i, _ in part]
            given = first_frame(config, part[0][1], seeds[0])
            videos = sample(pipeline, config, [a.caption for _, a in part], seeds, **given)
            done += [judge(video, a) for video, (_, a) in zip(videos, part, strict=True)]
            write_text(file, json.dumps(done))
            bar.update(len(part))
    return done


def first_frame(config: Config, attributes: Attributes, seed: int) -> dict[str, Any]:
    """Returns the image that image to video starts from, of a random scene; {} for other families."""
    if "image" not in FAMILIES[config.model.family].takes:
        return {}
    sizes, scene = config.generation, random_scene(attributes, torch.Generator().manual_seed(seed))
    frame = render(scene, 1, sizes.height, sizes.width)[0]
    return {"image": Image.fromarray((frame * 255).round().byte().numpy())}


def whole_run_seconds(runs: Mapping[str, tuple[Any, Config]], attributes: Attributes) -> dict[str, float]:
    """Returns mean seconds of a step of each whole run, by name; times its dense steps apart."""
    timed: dict[tuple[str, bool], tuple[Any, Config]] = {}
    for name, (pipeline, config) in runs.items():
        timed[name, False] = pipeline, without_warm_up(config)
        if dense_steps(config.attention, config.generation.steps) and config.attention.pattern != "dense":
            timed[name, True] = pipeline, with_pattern(config, "dense")
    seconds = seconds_in_turn(timed, attributes)
    return {
        name: mean_step(config, seconds.get((name, True), seconds[name, False]), seconds[name, False])
        for name, (_, config) in runs.items()
    }


def without_warm_up(config: Config) -> Config:
    """Returns the same run without steps whose attention is dense in every layer."""
    return replace(config, attention=replace(config.attention, dense_steps=0, dense_last_steps=0))


def mean_step(config: Config, dense: float, sparse: float) -> float:
    """Returns mean seconds of a step of a whole run, from those of a dense step and of another."""
    steps, count = config.generation.steps, len(dense_steps(config.attention, config.generation.steps))
    return (count * dense + (steps - count) * sparse) / steps


def seconds_in_turn(runs: Mapping[Any, tuple[Any, Config]], attributes: Attributes) -> dict[Any, float]:
    """Measures the median seconds of the first denoising steps of one video of each run, in turn.

    A run that begins with dense steps must be timed as two runs, as `whole_run_seconds` does.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    marks: list[float] = []

    def step_done(pipeline: Any, *_: object) -> dict:
        synchronizer(pipeline.device.type)()
        marks.append(time.perf_counter())
        return {}

    for _ in range(TIMED_RUNS):
        for name, (pipeline, config) in runs.items():
            marks.clear()
            short = replace(config, generation=replace(config.generation, steps=TIMED_STEPS))
            with attention(pipeline, short):
                given = first_frame(config, attributes, 0) | {"callback_on_step_end": step_done}
                sample(pipeline, short, [attributes.caption], [0], output_type="latent", **given)
            seconds[name] += [after - before for before, after in pairwise(marks)]
    return {name: median(values) for name, values in seconds.items()}
