"""Prompts over several seeds, dense and radial: how often a prompt comes out right, and in what time."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scripts.run.files import write_text
from scripts.run.inputs import Inputs
from scripts.run.plan import RunPlan, make_plan
from scripts.run.results import read_json, table
from scripts.run.sampler import Sampler
from scripts.toyworld.accuracy import first_frame, with_pattern
from scripts.toyworld.render import parse_caption
from scripts.toyworld.scores import judged, record

PATTERNS = ("dense", "radial")
SCORES = ("whole", "motion_throughout", "speed_right")
TITLES = (
    "prompt|attention|density|all four attributes|motion throughout|speed right|attributes and motion"
    "|seeds that fail|denoising, s"
)


def seed_records(
    plan: RunPlan, prompts: Sequence[str], seeds: Sequence[int], file: Path
) -> list[dict[str, Any]]:
    """Makes each prompt with each seed, dense and radial in turn; reuses the records that `file` holds.

    A record is that of `scripts.toyworld.scores` with `pattern`, `seed`, `density` and `denoise` (s) added.
    """
    records = read_json(file, list)
    made = {(entry["caption"], entry["seed"], entry["pattern"]) for entry in records}
    missing = [key for key in product(prompts, seeds, PATTERNS) if key not in made]
    pipeline = Sampler(plan).load() if missing else None
    for prompt, seed, pattern in tqdm(missing, desc="videos"):
        generation, seconds = replace(plan.config.generation, seed=seed), {}
        turn = make_plan(with_pattern(replace(plan.config, generation=generation), pattern))
        attributes = parse_caption(prompt)
        turn = replace(turn, inputs=Inputs(first_frame(turn.config, attributes, seed)))
        with tqdm(disable=True, total=generation.steps) as bar:
            frames, run = Sampler(turn).sample_video(pipeline, prompt, seconds, bar=bar)
        trained = plan.config.model.positions_frames or generation.num_frames
        scores = record(torch.from_numpy(frames / np.float32(255)), attributes, trained)
        about = {"caption": prompt, "pattern": pattern, "seed": seed, "denoise": seconds["denoise"]}
        records.append({**scores, **about, "density": run["attention"]["density"]})
        write_text(file, json.dumps(records))
    return records


def seed_row(records: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the cells of a line of the table, from the records of one prompt with one pattern."""
    scores = {entry["seed"]: judged(entry) for entry in records}
    right = {
        seed: entry["attributes"] == 1 and entry["motion_throughout"] != 0 for seed, entry in scores.items()
    }
    failed = ", ".join(str(seed) for seed, is_right in right.items() if not is_right) or "none"
    columns = [[entry[name] for entry in scores.values()] for name in SCORES] + [list(right.values())]
    counts = ["" if None in column else f"{int(sum(column))} of {len(column)}" for column in columns]
    first = [records[0]["caption"], records[0]["pattern"], f"{records[0]['density']:.3f}"]
    seconds = median(entry["denoise"] for entry in records)
    return [*first, *counts, failed, f"{seconds:.2f}"]


def seed_table(records: Sequence[dict[str, Any]], prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Returns the table as Markdown lines, and the meaning of its columns."""
    rows = []
    for prompt, pattern in product(prompts, PATTERNS):
        chosen = [entry for entry in records if (entry["caption"], entry["pattern"]) == (prompt, pattern)]
        rows.append(seed_row([entry for entry in chosen if entry["seed"] in seeds]))
    return [
        *table(TITLES, rows),
        "",
        "All four attributes: the toy world's reader sees colour, shape, motion and background of the prompt "
        "in the whole video. Motion throughout: each part as long as the model's training, read by itself, "
        "shows the motion of the prompt. Speed right: the period is one of the toy world's, within 10 %. A "
        "seed fails if an attribute or the motion of a part is wrong. Denoising: median seconds of a video, "
        "dense and radial in turn.",
    ]
