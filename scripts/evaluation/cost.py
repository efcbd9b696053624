"""Computes what attention costs over length and resolution, dense and under a preset's mask."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from radial_attn import radial_mask
from scripts.run.attention import radial_config, solve_mask
from scripts.run.config import VideoSize, read_config
from scripts.run.option_checks import check_size
from scripts.run.plan import RunPlan, make_plan

PRESETS = {
    "wan_tiny": "configs/wan_tiny.yaml",
    "wan": "configs/wan2.1_t2v_14b.yaml",
    "hunyuan": "configs/hunyuan_t2v.yaml",
    "mochi": "configs/mochi_t2v.yaml",
}
LENGTHS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)  # times the preset's length
SIDES = (0.5, 0.75, 1, 1.25, 1.5)


class Published(NamedTuple):
    """Holds a sparsity of the paper (percent), and the preset and overrides with its rule and size."""

    model: str
    preset: str
    percent: float
    words: tuple[str, ...] = ()


PAPER = (
    Published("HunyuanVideo", "configs/hunyuan_t2v_2x.yaml", 80.8),
    Published("HunyuanVideo", "configs/hunyuan_t2v_4x.yaml", 88.3),
    Published("Mochi 1", "configs/mochi_t2v_2x.yaml", 76.4),
    Published("Mochi 1", "configs/mochi_t2v_4x.yaml", 85.5),
    Published("Wan2.1-14B", "configs/wan2.1_t2v_14b_2x.yaml", 73.6, ("generation.height=768",)),
)


class Rates(NamedTuple):
    """Holds the operations a second of dense and of radial attention, and their source."""

    dense: float
    radial: float
    source: str


class Case(NamedTuple):
    """Holds a model's name, its planned preset, and the rates that predict times."""

    name: str
    plan: RunPlan
    rates: Rates | None = None

    def row(self, frames: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns one line of the table; `n_log_n`, which depends on other lines, is None.

        Raises UsageError for a size that the model does not take.
        """
        video, model = VideoSize(frames, *size), self.plan.model
        check_size(video, model)
        grid = model.grid(video)
        mask = radial_mask.__wrapped__(grid, solve_mask(self.plan.config.attention, grid))  # not cached
        dense = 4.0 * grid.tokens**2 * model.width * model.attention_layers()
        radial = dense * mask.density
        bound = 4.0 * grid.tokens_per_frame**2 * grid.frames * math.log2(grid.frames)  # the paper's, of pairs
        return {
            "model": self.name,
            **video._asdict(),
            "tokens": grid.tokens,
            "density": mask.density,
            "dense_flops": dense,
            "radial_flops": radial,
            "kept_blocks": int(mask.blocks.sum()),
            "n_log_n": None,
            "seconds_dense": self.rates and dense / self.rates.dense,
            "seconds_radial": self.rates and radial / self.rates.radial,
            "of_bound": mask.kept_pairs / bound if bound else None,
        }


def n_log_n(tokens: float) -> float:
    return tokens * math.log2(tokens)


def fit(rows: Sequence[dict[str, Any]]) -> tuple[float, float | None]:
    """Fits `c` of `c n log2 n` to the radial FLOPs by least squares; also R^2, None for a single length."""
    x = np.array([n_log_n(row["tokens"]) for row in rows])
    y = np.array([row["radial_flops"] for row in rows])
    factor = float(x @ y / (x @ x))
    spread = float(((y - y.mean()) ** 2).sum())
    return factor, 1 - float(((y - factor * x) ** 2).sum()) / spread if spread else None


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Fits `p` of `y ~ x^p` by least squares of the logarithms; None if x does not vary."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(set(x)) > 1 else None


def curves(
    case: Case, frames: Sequence[int] = (), sizes: Sequence[tuple[int, int]] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows of one model, over length and then over resolution, and the fits to them.

    Without `frames` or `sizes` the lengths or sizes are parts and multiples of the preset's. The curve over
    length is at the first of `sizes`, and the curve over resolution at the first of `frames`; else both are
    at the preset's.
    """
    usual, model = case.plan.size, case.plan.model
    (step, rest), chunks = model.frames_form, usual.frames // model.frames_form[0]
    lengths = sorted(set(frames or (round(chunks * part) * step + rest for part in LENGTHS)))
    factors = [(side, model.size_factor(axis)) for axis, side in enumerate(usual[1:], 1)]
    scaled = [tuple(max(1, round(side * part / by)) * by for side, by in factors) for part in SIDES]
    sides = list(dict.fromkeys(sizes or scaled))
    middle, size = [*frames, usual.frames][0], [*sizes, usual[1:]][0]
    along = [case.row(length, size) for length in lengths]
    across = [case.row(middle, side) for side in sides]
    factor, r2 = fit(along)
    rows = list({(row["frames"], row["height"], row["width"]): row for row in [*along, *across]}.values())
    for row in rows:
        row["n_log_n"] = factor * n_log_n(row["tokens"])
    fits: dict[str, Any] = {"c": factor, "r2": r2, "frames": middle, "size": list(size)}
    pixels = [height * width for height, width in sides]
    for kind in ("dense", "radial"):
        fits[f"{kind}_exponent_length"] = exponent(lengths, [row[f"{kind}_flops"] for row in along])
        fits[f"{kind}_exponent_pixels"] = exponent(pixels, [row[f"{kind}_flops"] for row in across])
    return rows, fits


def sparsities() -> list[dict[str, Any]]:
    """Returns the paper's sparsities and ours, percent of the pairs of video tokens; `preset`: unchanged."""
    rows = []
    for name, preset, percent, words in PAPER:
        plan, usual = read(preset, words).plan, read(preset, ()).plan
        video = radial_mask(replace(plan.grid, text=0), radial_config(plan.config.attention))
        ours, unchanged = (100 * (1 - mask.density) for mask in (video, usual.block_mask))
        start = {"model": name, "frames": plan.size.frames}
        rows.append(start | {"paper": percent, "ours": ours, "preset": unchanged})
    return rows


def read(name: str, words: Sequence[str]) -> Case:
    """Plans a name of `PRESETS` or a preset's file; UsageError if there is none or it cannot run."""
    return Case(name, make_plan(read_config(PRESETS.get(name, name), list(words)), dry_run=True))
