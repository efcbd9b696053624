"""The files of the analysis: analysis.json, tables in Markdown, and the curves with their fits."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radial_attn import TokenGrid
from radial_attn.analysis.bound import Tail
from radial_attn.analysis.decay import Fit, Profile, bands, column_reach, fit_exponential
from radial_attn.masks.draw import save_figure
from scripts.evaluation.attention_run import Looks
from scripts.evaluation.attention_tables import draw, lines
from scripts.evaluation.files import head, write_json, write_text
from scripts.run.plan import RunPlan

NAME = "analysis.json"
CURVES = ("temporal", "spatial", "planar")
DIGITS = 6
MOST_POINTS = 256  # of a curve in the JSON; fits are of all
MOST_ERROR = 2.0  # of any two softmax rows


@dataclass(frozen=True)
class Analysis:
    """What was gathered, by layer, and what it was gathered from."""

    command: str
    plan: RunPlan
    looks: Looks
    profiles: dict[int, Profile]
    tails: dict[int, Tail]


def write(analysis: Analysis, work: Path, out: Path) -> list[str]:
    """Writes JSON, Markdown and picture; what was found and where it stands, in lines for the reader.

    Raises OSError where a file cannot be written.
    """
    data, picture = content(analysis), out.with_suffix(".png")
    files = [write_json(work / NAME, data), write_text(out, "\n".join(lines(data, picture.name)) + "\n")]
    save_figure(draw(data), picture)
    fits = [f"{name}: {_shown(data['fits'][name])}" for name in CURVES]
    return [*fits, *(f"written {file}" for file in (*files, picture))]


def _shown(fit: dict[str, float | None]) -> str:
    if fit["a"] is None:
        return "no fit"
    return "y = exp(-a x + b), " + ", ".join(
        f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in fit.items()
    )


def content(analysis: Analysis) -> dict[str, Any]:
    """What the JSON holds."""
    plan, looks, profiles = analysis.plan, analysis.looks, list(analysis.profiles.values())
    whole = _stacked(profiles)
    curves = {name: getattr(whole, f"{name}_curve") for name in CURVES}
    return {
        **head("analysis", analysis.command, plan.device, plan.config),
        "grid": [plan.grid.frames, plan.grid.height, plan.grid.width, plan.grid.text],
        "prompts": list(plan.prompts.values()),
        "steps": list(looks.steps),
        "timestep": looks.timestep,
        "rows": looks.rows,
        "layers": list(analysis.profiles),
        "profiles": {name: _profile(curve, len(profiles)) for name, curve in curves.items()},
        "fits": {name: _fit(curve.mean(0)) for name, curve in curves.items()},
        "heads": [_heads(profile) for profile in profiles],
        "frames": _frames(whole),
        "bands": _bands(whole, plan.grid),
        "column_reach": column_reach(plan.grid),
        "tail": _tail(list(analysis.tails.values())),
        "density": plan.block_mask.density,
        "mask": asdict(plan.mask),
    }


def _stacked(profiles: Sequence[Profile]) -> Profile:
    """All heads of all layers as one layer; the layers have looked at rows at the same distances."""
    shared = {"rows", *(f"{name}_pairs" for name in CURVES)}
    parts = {name: [getattr(profile, name) for profile in profiles] for name in vars(profiles[0])}
    return Profile(**{name: x[0] if name in shared else torch.cat(x) for name, x in parts.items()})


def _profile(curve: Tensor, layers: int) -> dict[str, Any]:
    """A curve `[L H, N]` at all distances, or at some of many that lie closest at first."""
    count = curve.shape[1]
    places = np.arange(count)
    if count > MOST_POINTS:
        places = np.unique(np.geomspace(1, count, MOST_POINTS).round().astype(int)) - 1
    chosen = curve[:, places]
    heads = chosen.view(layers, -1, len(places))
    return {
        "distance": places.tolist(),
        "mean": _rounded(chosen.mean(0)),
        "heads": [[_rounded(curve) for curve in layer] for layer in heads],
    }


def _fit(curve: Tensor) -> dict[str, float | None]:
    """Of a curve by distance; None for what there is not."""
    found = fit_exponential(np.arange(len(curve)), curve.numpy()) or Fit(None, None, None)
    return found._asdict()


def _heads(profile: Profile) -> list[dict[str, Any]]:
    """Class, fits and the two masses that decide on the class, of each head of a layer."""
    curves = {name: getattr(profile, f"{name}_curve") for name in CURVES}
    return [
        {
            "class": "temporal" if profile.is_temporal[place] else "spatial",
            "fit": {name: _fit(curve[place]) for name, curve in curves.items()},
            "own_frame": _number(profile.mass[place, 0] / profile.rows),
            "own_column": _number(profile.column[place] / profile.rows),
        }
        for place in range(len(profile.column))
    ]


def _frames(profile: Profile) -> dict[str, list[float]]:
    """Mean attention on all keys of the frames at each distance, and the part of it that the mask keeps."""
    mass, kept = (x.mean(0) / profile.rows for x in (profile.mass, profile.kept))
    return {"distance": list(range(len(mass))), "mass": _rounded(mass), "kept": _rounded(kept)}


def _bands(profile: Profile, grid: TokenGrid) -> list[dict[str, Any]]:
    """Share of the attention on each band of frame distances and on text, and the part of it that is kept."""
    found = []
    for band in bands(grid.frames):
        mass, kept = (x[:, band.start : band.stop].sum(1).mean() for x in (profile.mass, profile.kept))
        name = f"{band[0]}" if len(band) == 1 else f"{band[0]}-{band[-1]}"
        found.append((name, mass, kept))
    if grid.text:
        found.append(("text", profile.text.mean(), profile.text_kept.mean()))
    return [
        {
            "frames": name,
            "mass": _number(mass / profile.rows),
            "kept": _number(kept / mass) if mass > 0 else None,
        }
        for name, mass, kept in found
    ]


def _tail(tails: Sequence[Tail]) -> dict[str, Any]:
    """Means over all sampled rows, and how many of these the bounds are of use for."""
    whole = Tail(*map(torch.cat, zip(*tails, strict=True)))
    return {
        **{name: _number(getattr(whole, name).mean()) for name in ("bound", "l1", "mask_bound", "mask_l1")},
        "rows": len(whole.l1),
        "median": {name: _number(value.median()) for name, value in whole._asdict().items()},
        "exceeded": int((whole.l1 > whole.bound * (1 + 1e-9)).sum()),
        "vacuous": _number((whole.bound >= MOST_ERROR).double().mean()),
        "mask_vacuous": _number((whole.mask_bound >= MOST_ERROR).double().mean()),
        "paper_exceeded": _number((whole.l1 > whole.paper_bound).double().mean()),
    }


def _number(value: Tensor) -> float:
    return float(f"{value.item():.{DIGITS}g}")


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
