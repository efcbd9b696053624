"""Computes what analysis.json contains from the profiles and tails of all layers."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radial_attn import TokenGrid
from radial_attn.analysis.bound import Tail
from radial_attn.analysis.decay import Fit, Profile, bands, column_reach, fit_exponential
from scripts.evaluation.attention_run import Looks
from scripts.run.plan import RunPlan
from scripts.run.results import head, rounded

CURVES = ("temporal", "spatial", "planar")
MOST_POINTS = 256  # of a curve in the JSON; fits use all
MOST_ERROR = 2.0  # of any two softmax rows


def content(
    command: str, plan: RunPlan, looks: Looks, profiles: dict[int, Profile], tails: dict[int, Tail]
) -> dict[str, Any]:
    """Returns the content of the JSON; profiles and tails are by layer."""
    whole = stacked(list(profiles.values()))
    curves = curves_of(whole)
    return {
        **head("analysis", command, plan.device, plan.config),
        "grid": [plan.grid.frames, plan.grid.height, plan.grid.width, plan.grid.text],
        "prompts": list(plan.prompts.values()),
        "steps": list(looks.steps),
        "timestep": looks.timestep,
        "rows": looks.rows,
        "layers": list(profiles),
        "profiles": {name: thinned(curve, len(profiles)) for name, curve in curves.items()},
        "fits": {name: _fit(curve.mean(0)) for name, curve in curves.items()},
        "heads": [_heads(profile) for profile in profiles.values()],
        "frames": _frames(whole),
        "bands": _bands(whole, plan.grid),
        "column_reach": column_reach(plan.grid),
        "tail": _tail(tails.values()),
        "density": plan.block_mask.density,
        "mask": asdict(plan.mask),
    }


def stacked(profiles: list[Profile]) -> Profile:
    """Stacks the heads of all layers as one layer; the rows of all layers have the same distances."""
    shared = {"rows", *(f"{name}_pairs" for name in CURVES)}
    parts = {name: [getattr(profile, name) for profile in profiles] for name in vars(profiles[0])}
    return Profile(**{name: x[0] if name in shared else torch.cat(x) for name, x in parts.items()})


def curves_of(profile: Profile) -> dict[str, Tensor]:
    return {name: getattr(profile, f"{name}_curve") for name in CURVES}


def thinned(curve: Tensor, layers: int) -> dict[str, Any]:
    """Returns a curve `[L H, N]` at all distances, or at `MOST_POINTS` that are densest near 0."""
    points = np.arange(curve.shape[1])
    if len(points) > MOST_POINTS:
        points = np.unique(np.geomspace(1, len(points), MOST_POINTS).round().astype(int)) - 1
    chosen = curve[:, points]
    heads = rounded(chosen.view(layers, -1, len(points)))
    return {"distance": points.tolist(), "mean": rounded(chosen.mean(0)), "heads": heads}


def _fit(curve: Tensor) -> dict[str, float | None]:
    """Fits a curve by distance; its numbers are None if there is no fit."""
    fit = fit_exponential(np.arange(len(curve)), curve.numpy()) or Fit(None, None, None)
    return fit._asdict()


def _heads(profile: Profile) -> list[dict[str, Any]]:
    """Returns class, fits and the two masses that decide on the class, of each head of a layer."""
    curves = curves_of(profile)
    return [
        {
            "class": "temporal" if profile.is_temporal[head] else "spatial",
            "fit": {name: _fit(curve[head]) for name, curve in curves.items()},
            "own_frame": rounded(profile.mass[head, 0] / profile.rows),
            "own_column": rounded(profile.column[head] / profile.rows),
        }
        for head in range(len(profile.column))
    ]


def _frames(profile: Profile) -> dict[str, list[float]]:
    """Returns the mean attention on the frames at each distance, and the part that the mask keeps."""
    mass, kept = (rounded(x.mean(0) / profile.rows) for x in (profile.mass, profile.kept))
    return {"distance": list(range(len(mass))), "mass": mass, "kept": kept}


def _bands(profile: Profile, grid: TokenGrid) -> list[dict[str, Any]]:
    """Returns the share of the attention on each band and on text, and the part of it that is kept."""
    rows = []
    for band in bands(grid.frames):
        name = f"{band[0]}" if len(band) == 1 else f"{band[0]}-{band[-1]}"
        rows.append((name, *(x[:, band.start : band.stop].sum(1) for x in (profile.mass, profile.kept))))
    if grid.text:
        rows.append(("text", profile.text, profile.text_kept))
    means = ((name, mass.mean(), kept.mean()) for name, mass, kept in rows)
    return [
        {
            "frames": name,
            "mass": rounded(mass / profile.rows),
            "kept": rounded(kept / mass) if mass > 0 else None,
        }
        for name, mass, kept in means
    ]


def _tail(tails: Iterable[Tail]) -> dict[str, Any]:
    """Returns means over all sampled rows, and how many of them the bounds are of use for."""
    whole = Tail(*map(torch.cat, zip(*tails, strict=True)))
    return {
        **{name: rounded(getattr(whole, name).mean()) for name in ("bound", "l1", "mask_bound", "mask_l1")},
        "rows": len(whole.l1),
        "median": {name: rounded(value.median()) for name, value in whole._asdict().items()},
        "exceeded": int((whole.l1 > whole.bound * (1 + 1e-9)).sum()),
        "vacuous": rounded((whole.bound >= MOST_ERROR).double().mean()),
        "mask_vacuous": rounded((whole.mask_bound >= MOST_ERROR).double().mean()),
        "paper_exceeded": rounded((whole.l1 > whole.paper_bound).double().mean()),
    }
