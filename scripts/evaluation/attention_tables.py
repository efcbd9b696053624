"""Tables and picture of an analysis, from what its JSON holds."""

from collections import Counter
from collections.abc import Iterable
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from scripts.evaluation.files import number, table
from scripts.run.system import pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # Okabe and Ito
PAPERS = 0.985  # R^2 of the paper's fits
DISTANCES = {"temporal": "frames", "spatial": "tokens in raster order", "planar": "tokens in the plane"}
MEANING = """`temporal`: mean attention after the softmax on one key at the query's own position in another
frame, over the distance in frames. `spatial`: on one key of the query's own frame, over the distance in
raster order, the paper's |k - l|; a token above or below is a whole row of the frame away. `planar`: the same
keys over their Euclidean distance within the frame, rounded. Each curve is the mean over all heads, and the
fit is by least squares of y itself, every distance counting alike, as is R^2."""
CLASSES = """A head is temporal where it puts more attention on the column of its query's position (raster
distance up to {reach} in every frame) than on its own frame: both have about as many keys."""
TAIL = """L1 is the error of the masked, renormalised softmax row. For each row alpha, beta and C_rel are
those with which eq. 3 holds for every key of the video and the bound is least; the bound is
2 C_rel p(own key) sum over dropped keys of exp(-alpha d - beta |k - l|), analysis/bound.py derives it. No
error exceeds 2, so a bound from 2 on says nothing. Eq. 7 is the paper's bound with the same constants."""


def lines(data: dict[str, Any], picture: str) -> list[str]:
    """The Markdown."""
    return [
        "# Energy decay of attention",
        "",
        f"    {data['command']}",
        "",
        _setting(data),
        "",
        _joined(MEANING),
        *_fits(data),
        "",
        f"![attention over temporal and spatial distance]({picture})",
        "",
        _joined(CLASSES).format(reach=data["column_reach"]),
        *_classes(data),
        "",
        f"What the mask ({_mask(data)}) keeps of it:",
        *_bands(data),
        "",
        _joined(TAIL),
        *_tail(data["tail"]),
        "",
        pairs(data["versions"], data["hardware"]),
    ]


def _joined(text: str) -> str:
    return " ".join(text.split())


def _setting(data: dict[str, Any]) -> str:
    """What was looked at, in a sentence."""
    frames, height, width, text = data["grid"]
    where = f"steps {', '.join(map(str, data['steps']))} of {data['config']['generation']['steps']}"
    if data["timestep"] is not None:
        where = f"one call on noise at timestep {data['timestep']:g}"
    of_text = f" and {text} text tokens" if text else ""
    return (
        f"{data['config']['model']['path']}, {frames} frames of {height} x {width} tokens{of_text}; dense, "
        f"{where}, {len(data['prompts'])} prompt(s), {data['rows']} query rows of each call, layers "
        f"{_ranges(data['layers'])}."
    )


def _ranges(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def _all_heads(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [head for layer in data["heads"] for head in layer]


def _fits(data: dict[str, Any]) -> list[str]:
    """The fits of the mean curves, and those of single heads in numbers."""
    rows = []
    for name, fit in data["fits"].items():
        own = [head["fit"][name]["r2"] for head in _all_heads(data)]
        known = [r2 for r2 in own if r2 is not None]
        good = sum(r2 > PAPERS for r2 in known)
        middle = float(np.median(known)) if known else None
        cells = [number(fit[key], form) for key, form in (("a", ".4g"), ("b", ".4g"), ("r2", ".4f"))]
        rows.append([name, *cells, number(middle, ".3f"), f"{good} of {len(own)}"])
    titles = f"curve | a | b | R^2 | R^2 of a head, median | heads above {PAPERS}"
    return table(titles, rows)


def _classes(data: dict[str, Any]) -> list[str]:
    rows = []
    for layer, heads in zip(data["layers"], data["heads"], strict=True):
        counts = Counter(head["class"] for head in heads)
        masses = [mean(head[name] for head in heads) for name in ("own_frame", "own_column")]
        rows.append([layer, counts["spatial"], counts["temporal"], *(f"{mass:.3f}" for mass in masses)])
    return table("layer | spatial heads | temporal heads | mass on own frame | on own column", rows)


def _mask(data: dict[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in data["mask"].items() if value is not None)
    return f"density {data['density']:.4f}; {options}"


def _bands(data: dict[str, Any]) -> list[str]:
    found = data["bands"]
    kept = sum(band["mass"] * band["kept"] for band in found if band["kept"] is not None)
    rows = [[b["frames"], f"{100 * b['mass']:.2f}", number(_percent(b["kept"]), ".2f")] for b in found]
    total = f"{100 * sum(band['mass'] for band in found):.2f}"
    rows.append(["all", total, f"{100 * kept:.2f}"])
    return table("frames apart | mass, % | of it kept, %", rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _tail(tail: dict[str, Any]) -> list[str]:
    middle = tail["median"]
    rows = [
        ["eq. 4", *_errors(tail, "l1", "bound"), _share(tail["vacuous"])],
        ["the one in use", *_errors(tail, "mask_l1", "mask_bound"), _share(tail["mask_vacuous"])],
    ]
    titles = "mask | L1, mean | L1, median | bound, mean | bound, median | rows with a bound from 2 on"
    fitted = ", ".join(f"{name} {middle[name]:.3g}" for name in ("alpha", "beta", "c_rel"))
    return [
        *table(titles, rows),
        "",
        f"Medians over {tail['rows']} rows: {fitted}. The error exceeds the bound in {tail['exceeded']} "
        f"rows, and eq. 7 in {_share(tail['paper_exceeded'])}.",
    ]


def _errors(tail: dict[str, Any], *names: str) -> Iterable[str]:
    return (f"{x:.4g}" for name in names for x in (tail[name], tail["median"][name]))


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def draw(data: dict[str, Any]) -> "Figure":
    """The curves with heads and fits, and the mass by frame distance with what the mask keeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, name in zip(panels, data["profiles"], strict=False):
        _draw_curve(axes, name, data["profiles"][name], data["fits"][name])
    frames, axes = data["frames"], panels[3]
    axes.bar(
        frames["distance"], frames["mass"], color=ORANGE, hatch="///", edgecolor="white", label="dropped"
    )
    axes.bar(frames["distance"], frames["kept"], color=BLUE, label="kept by the mask")
    axes.set(xlabel="frames apart", ylabel="share of the attention", title="Mass by frame distance")
    axes.legend(frameon=False)
    return figure


def _draw_curve(axes: "Axes", name: str, profile: dict[str, Any], fit: dict[str, Any]) -> None:
    """Thin lines are heads, points their mean, the dashed line its fit; attention on a logarithmic scale."""
    x = np.array(profile["distance"])
    for head in (head for layer in profile["heads"] for head in layer):
        axes.plot(x, _positive(head), color=GREY, linewidth=0.4, alpha=0.5, zorder=1)
    many = len(x) > 40
    axes.plot(
        x, _positive(profile["mean"]), "." if many else "o", color=BLUE, label="mean of all heads", zorder=3
    )
    if fit["a"] is not None:
        r2 = "" if fit["r2"] is None else f", R² {fit['r2']:.3f}"
        label = f"exp(-{fit['a']:.3g} x {fit['b']:+.3g}){r2}"
        axes.plot(x, np.exp(fit["b"] - fit["a"] * x), "--", color=ORANGE, label=label, zorder=4)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(1e-9, 0.2 * np.nanmin(_positive(profile["mean"]))))
    axes.set(
        xlabel=f"distance, {DISTANCES[name]}",
        ylabel="attention on one key",
        title=f"{name.capitalize()} decay",
    )
    axes.legend(frameon=False)


def _positive(curve: list[float]) -> np.ndarray:
    """With a gap where the logarithm has no place."""
    values = np.array(curve, dtype=float)
    return np.where(values > 0, values, np.nan)
