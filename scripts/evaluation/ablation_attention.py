"""Recall and output error of many masks on the attention of one dense run, at every step and layer."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from radial_attn.analysis.recall import Kept, kept_by, sample_rows
from radial_attn.models import apply_radial_attention
from radial_attn.models.runtime.observe import Seen
from scripts.evaluation.ablation_measure import Setup
from scripts.evaluation.ablation_runs import Run, mask_of
from scripts.evaluation.files import write_json
from scripts.run.config import Config
from scripts.run.plan import attention_options
from scripts.run.sampler import sample
from scripts.toyworld.accuracy import first_frame

KINDS = Kept._fields
Readings = dict[str, list[list[float]]]  # by kind: step, layer


def looked_at(setup: Setup, pipeline: Any, masks: Mapping[str, Config], file: Path) -> dict[str, Readings]:
    """Readings of each mask, by its name, along the dense video of the first caption.

    They are means over samples, heads, sampled query rows and the calls of a step. Those that `file` has
    already are not made again.
    """
    known = json.loads(file.read_text()) if file.exists() else {}
    missing = {name: masked for name, masked in masks.items() if name not in known}
    if missing:
        known |= _watch(setup, pipeline, missing)
        write_json(file, known)
    return {name: known[name] for name in masks}


def _watch(setup: Setup, pipeline: Any, masks: Mapping[str, Config]) -> dict[str, Readings]:
    config, first = setup.dense, setup.captions[0]
    found: dict[str, dict[tuple[int, int], list[tuple[float, ...]]]] = {name: {} for name in masks}
    built = lru_cache(maxsize=None)(lambda grid, name: mask_of(grid, masks[name]))
    with tqdm(desc=f"attention of {len(masks)} masks", unit="call") as bar:

        def observe(seen: Seen) -> None:
            built_masks = [built(seen.mask.grid, name) for name in found]
            rows, lengths = sample_rows(seen.mask.grid, setup.rows), seen.text_lengths
            kept = kept_by(seen.query, seen.key, seen.value, built_masks, rows, text_lengths=lengths)
            for cells, numbers in zip(found.values(), kept, strict=True):
                call = tuple(part.mean().item() for part in numbers)
                cells.setdefault((seen.step, seen.layer), []).append(call)
            bar.update()

        with apply_radial_attention(pipeline, **attention_options(config), observe=observe):
            seed = config.generation.seed
            given = first_frame(config, first, seed)
            sample(pipeline, config, [first.caption], [seed], output_type="latent", **given)
    return {name: _nested(cells) for name, cells in found.items()}


def _nested(cells: dict[tuple[int, int], list[tuple[float, ...]]]) -> Readings:
    steps, layers = (1 + max(place[axis] for place in cells) for axis in (0, 1))
    return {
        kind: [
            [mean(call[i] for call in cells[step, layer]) for layer in range(layers)] for step in range(steps)
        ]
        for i, kind in enumerate(KINDS)
    }


def of_run(run: Run, readings: Readings) -> dict[str, float]:
    """Means over steps and layers of a run, where those that are dense keep everything and err by nothing.

    `recall`, `mse`, and `relative`, the mean error over the mean square of the dense output.
    """
    cells = [
        (step, layer, step in run.dense or layer < run.layers)
        for step, row in enumerate(readings["recall"])
        for layer in range(len(row))
    ]
    kept = mean(1.0 if dense else readings["recall"][step][layer] for step, layer, dense in cells)
    error = mean(0.0 if dense else readings["mse"][step][layer] for step, layer, dense in cells)
    return {
        "recall": kept,
        "mse": error,
        "relative": error / mean(readings["dense"][step][layer] for step, layer, _ in cells),
    }
